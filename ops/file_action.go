package ops

import (
	"context"
	"fmt"
	"slices"

	"github.com/kilnbuild/kiln/ops/filetree"
	"github.com/moby/buildkit/solver/pb"
	"golang.org/x/sys/unix"
)

// apply does to root what a says.
func (r *fileRun) apply(ctx context.Context, a *pb.FileAction, root filetree.Root) error {
	owner, err := fileOwner(fileActionOwner(a), func(state int) (filetree.Root, error) {
		if state == int(a.Input) {
			return root, nil // as it is before the action
		}
		return r.root(ctx, state)
	})
	if err != nil {
		return err
	}
	switch x := a.Action.(type) {
	case *pb.FileAction_Mkdir:
		mkdir := root.Mkdir
		if x.Mkdir.MakeParents {
			mkdir = root.MkdirAll
		}
		return mkdir(x.Mkdir.Path, uint32(x.Mkdir.Mode), fileStamp(owner, x.Mkdir.Timestamp))
	case *pb.FileAction_Mkfile:
		return root.Mkfile(x.Mkfile.Path, x.Mkfile.Data, uint32(x.Mkfile.Mode), fileStamp(owner, x.Mkfile.Timestamp))
	case *pb.FileAction_Symlink:
		return root.Symlink(x.Symlink.Oldpath, x.Symlink.Newpath, fileStamp(owner, x.Symlink.Timestamp))
	case *pb.FileAction_Rm:
		remove := root.Remove
		if x.Rm.AllowWildcard {
			remove = root.RemoveMatches
		}
		return remove(x.Rm.Path, x.Rm.AllowNotFound)
	case *pb.FileAction_Copy:
		c, err := fileCopy(x.Copy, owner)
		if err != nil {
			return err
		}
		return r.copyFrom(ctx, int(a.SecondaryInput), c, root)
	}
	return fmt.Errorf("internal error: action of kind %T was checked but can't be run", a.Action)
}

// fileActionPlace returns the path at which a makes something, if it looks at
// nothing else of the state that it changes; "/" if it may.
func fileActionPlace(a *pb.FileAction) string {
	if slices.Contains(fileNeeds(a)[1:], int(a.Input)) {
		return "/"
	}
	switch x := a.Action.(type) {
	case *pb.FileAction_Mkdir:
		return x.Mkdir.Path
	case *pb.FileAction_Mkfile:
		return x.Mkfile.Path
	case *pb.FileAction_Symlink:
		return x.Symlink.Newpath
	}
	return "/"
}

// fileCopy is what the action copies, and how.
func fileCopy(a *pb.FileActionCopy, owner *filetree.Owner) (*filetree.Copy, error) {
	chmod, err := fileChmod(a)
	if err != nil {
		return nil, err
	}
	return &filetree.Copy{
		Src: a.Src, Dest: a.Dest,
		FollowLinks: a.FollowSymlink,
		Contents:    a.DirCopyContents,
		MakeParents: a.CreateDestPath,
		Replace:     a.AlwaysReplaceExistingDestPaths,
		Wildcards:   a.AllowWildcard,
		AllowNone:   a.AllowEmptyWildcard,
		Unpack:      a.AttemptUnpackDockerCompatibility,
		Include:     a.IncludePatterns,
		Exclude:     a.ExcludePatterns,
		Required:    a.RequiredPaths,
		Stamp:       fileStamp(owner, a.Timestamp),
		Chmod:       chmod,
	}, nil
}

// fileChmod is what the action does to permissions. An expression counts more than
// bits, of which -1 is none.
func fileChmod(a *pb.FileActionCopy) (filetree.Chmod, error) {
	if a.ModeStr != "" {
		return filetree.ParseChmod(a.ModeStr)
	}
	if a.Mode == -1 {
		return filetree.Chmod{}, nil
	}
	return filetree.ChmodTo(uint32(a.Mode)), nil
}

// fileStamp is what an action with a timestamp gives to new files. That is in
// nanoseconds, or -1 for none (LLB-061).
func fileStamp(owner *filetree.Owner, timestamp int64) filetree.Stamp {
	if timestamp == -1 {
		return filetree.Stamp{Owner: owner}
	}
	ts := unix.NsecToTimespec(timestamp)
	return filetree.Stamp{Owner: owner, Time: &ts}
}

// fileOwner returns whom opt makes the owner, nil if it is nil (LLB-062). A user
// brings its group along unless another is named. root opens the state that a name is
// looked up in.
func fileOwner(opt *pb.ChownOpt, root func(state int) (filetree.Root, error)) (_ *filetree.Owner, err error) {
	if opt == nil {
		return nil, nil
	}
	var owner filetree.Owner
	switch u := opt.GetUser().GetUser().(type) {
	case *pb.UserOpt_ByID:
		owner = filetree.Owner{UID: int(u.ByID), GID: int(u.ByID)}
	case *pb.UserOpt_ByName:
		if owner, err = fileLookup("user", u.ByName, root, filetree.Root.User); err != nil {
			return nil, err
		}
	}
	switch g := opt.GetGroup().GetUser().(type) {
	case *pb.UserOpt_ByID:
		owner.GID = int(g.ByID)
	case *pb.UserOpt_ByName:
		if owner.GID, err = fileLookup("group", g.ByName, root, filetree.Root.Group); err != nil {
			return nil, err
		}
	}
	return &owner, nil
}

// fileLookup looks up a user or group in the state that by names.
func fileLookup[T any](kind string, by *pb.NamedUserOpt, root func(int) (filetree.Root, error), find func(filetree.Root, string) (T, error)) (found T, err error) {
	r, err := root(int(by.Input))
	if err == nil {
		found, err = find(r, by.Name)
	}
	if err != nil {
		return found, fmt.Errorf("look up %s %q: %w", kind, by.Name, err)
	}
	return found, nil
}
