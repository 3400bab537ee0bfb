package ops

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"
)

const (
	filePasswd = "/etc/passwd"
	fileGroup  = "/etc/group"

	fileMaxUsers = 10 << 20
)

// fileOwnerIDs returns whom opt makes the owner, nil if it is nil (LLB-062). A
// user brings its group along unless another is named. root opens the state
// that a name is looked up in; a name that isn't there, or a state without
// such names, is 0.
func fileOwnerIDs(opt *pb.ChownOpt, root func(state int) (fileRoot, error)) (*fileIDs, error) {
	if opt == nil {
		return nil, nil
	}
	var ids fileIDs
	switch u := opt.GetUser().GetUser().(type) {
	case *pb.UserOpt_ByID:
		ids = fileIDs{int(u.ByID), int(u.ByID)}
	case *pb.UserOpt_ByName:
		err := fileLookup(u.ByName, filePasswd, root, func(r io.Reader) error {
			users, err := user.ParsePasswdFilter(r, func(e user.User) bool { return e.Name == u.ByName.Name })
			if err == nil && len(users) > 0 {
				ids = fileIDs{users[0].Uid, users[0].Gid}
			}
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("look up user %q: %w", u.ByName.Name, err)
		}
	}
	switch g := opt.GetGroup().GetUser().(type) {
	case *pb.UserOpt_ByID:
		ids.gid = int(g.ByID)
	case *pb.UserOpt_ByName:
		err := fileLookup(g.ByName, fileGroup, root, func(r io.Reader) error {
			groups, err := user.ParseGroupFilter(r, func(e user.Group) bool { return e.Name == g.ByName.Name })
			if err == nil && len(groups) > 0 {
				ids.gid = groups[0].Gid
			}
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("look up group %q: %w", g.ByName.Name, err)
		}
	}
	return &ids, nil
}

// fileLookup has parse read the file of users or groups at p in the state that
// opt names.
func fileLookup(opt *pb.NamedUserOpt, p string, root func(int) (fileRoot, error), parse func(io.Reader) error) error {
	r, err := root(int(opt.Input))
	if err != nil {
		return err
	}
	f, err := r.openUsers(p)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	limited := &io.LimitedReader{R: f, N: fileMaxUsers + 1}
	if err := parse(limited); err != nil {
		return fmt.Errorf("read %s: %w", p, err)
	}
	if limited.N == 0 {
		return fmt.Errorf("read %s: it exceeds %d bytes", p, fileMaxUsers)
	}
	return nil
}

func (r fileRoot) openUsers(p string) (*os.File, error) {
	at, err := r.resolve(p, true)
	if err != nil {
		return nil, err
	}
	return r.openRegular(at)
}
