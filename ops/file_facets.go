package ops

import (
	"path"
	"strconv"
	"strings"

	"github.com/moby/buildkit/solver/pb"
)

func (f *fileOp) kind() string { return "file" }

// facets takes the actions apart that are hashed for the key (file_key.go).
func (f *fileOp) facets() []Facet {
	const most = 8 // facets that an action has
	out := make(facets, 0, most*len(f.op.Actions)+1)
	order := make([]byte, 0, 64)
	for i, a := range f.op.Actions {
		// The actions of a step are nearly always of different targets, and
		// most steps have one.
		prefix := ""
		if i > 0 {
			prefix = "action " + strconv.Itoa(i+1) + ": "
			order = append(order, ',')
		}
		out.action(prefix, a, f.inputs)
		owner := fileActionOwner(a) // names are looked up in a state
		for i, n := range [...]int64{
			a.Input, a.SecondaryInput, a.Output,
			owner.GetUser().GetByName().GetInput(), owner.GetGroup().GetByName().GetInput(),
		} {
			if i > 0 {
				order = append(order, ' ')
			}
			order = strconv.AppendInt(order, n, 10)
		}
	}
	out.private("order of the actions", string(order))
	return out
}

func (f *facets) action(prefix string, a *pb.FileAction, inputs int) {
	// A name with a prefix is only made for what is kept: there may be thousands of actions.
	add := func(name, value string) {
		if value != "" {
			f.add(prefix+name, value)
		}
	}
	flag := func(name string, set bool) {
		if set {
			f.flag(prefix+name, true)
		}
	}
	switch x := a.Action.(type) {
	case *pb.FileAction_Copy:
		c := x.Copy
		src := c.Src
		if fileIsInput(a.SecondaryInput, inputs) {
			src = path.Base(src)
		}
		add("action", "copy")
		add("source", src)
		add("destination", c.Dest)
		add("mode", modeText(c.Mode, c.ModeStr))
		add("timestamp", timeText(c.Timestamp))
		add("include patterns", strings.Join(c.IncludePatterns, " "))
		add("exclude patterns", strings.Join(c.ExcludePatterns, " "))
		add("required paths", strings.Join(c.RequiredPaths, " "))
		flag("following of links", c.FollowSymlink)
		flag("copying of contents", c.DirCopyContents)
		flag("unpacking", c.AttemptUnpackDockerCompatibility)
		flag("making of the destination", c.CreateDestPath)
		flag("wildcards", c.AllowWildcard)
		flag("empty wildcards", c.AllowEmptyWildcard)
		flag("replacing of what is there", c.AlwaysReplaceExistingDestPaths)
	case *pb.FileAction_Mkfile:
		add("action", "write a file")
		add("destination", x.Mkfile.Path)
		add("mode", modeText(x.Mkfile.Mode, ""))
		add("timestamp", timeText(x.Mkfile.Timestamp))
		f.private(prefix+"content", string(x.Mkfile.Data))
	case *pb.FileAction_Mkdir:
		add("action", "make a directory")
		add("destination", x.Mkdir.Path)
		add("mode", modeText(x.Mkdir.Mode, ""))
		add("timestamp", timeText(x.Mkdir.Timestamp))
		flag("making of parents", x.Mkdir.MakeParents)
	case *pb.FileAction_Symlink:
		add("action", "make a link")
		add("destination", x.Symlink.Newpath)
		add("link target", x.Symlink.Oldpath)
		add("timestamp", timeText(x.Symlink.Timestamp))
	case *pb.FileAction_Rm:
		add("action", "remove")
		add("path", x.Rm.Path)
		flag("allowing of nothing to remove", x.Rm.AllowNotFound)
		flag("wildcards", x.Rm.AllowWildcard)
	}
	if owner := fileActionOwner(a); owner != nil {
		add("owner", userText(owner.User)+":"+userText(owner.Group))
	}
}

func modeText(mode int32, symbolic string) string {
	if mode < 0 {
		return symbolic
	}
	octal := strconv.FormatInt(int64(mode), 8)
	if mode > 0 {
		octal = "0" + octal
	}
	return strings.TrimSuffix(octal+" "+symbolic, " ")
}

// timeText leaves out -1, which is the time at which the step runs.
func timeText(ns int64) string {
	if ns < 0 {
		return ""
	}
	return strconv.FormatInt(ns, 10)
}

func userText(u *pb.UserOpt) string {
	if by := u.GetByName(); by != nil {
		return by.Name
	}
	return strconv.FormatUint(uint64(u.GetByID()), 10)
}

// reads are the parts of an input that are copied from it, as they enter its
// key.
func (f *fileOp) reads(input int) []fileSelector {
	f.readOnce.Do(func() { f.read = fileReads(f.op, f.inputs) })
	return fileDedupe(f.read[input])
}
