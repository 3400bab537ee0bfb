package llb

import (
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/moby/buildkit/solver/pb"
)

// FileAction is a change to files, possibly after others: a chain.
//
//	llb.Mkdir("/a", 0o755).Mkfile("/a/b", 0o644, data).Copy(src, "/x", "/a/")
type FileAction struct {
	prev   *FileAction
	action fileAction
}

// fileAction fills in fa. Relative paths are below dir; base is the input that
// user names are looked up in.
type fileAction interface {
	write(w *fileWriter, fa *pb.FileAction, dir string, base int64) error
}

func (a *FileAction) then(next *FileAction) *FileAction {
	next.prev = a
	return next
}

// Mkdir makes a directory.
func Mkdir(p string, perm os.FileMode, opts ...MkdirOption) *FileAction {
	a := &mkdir{path: p, perm: perm}
	for _, o := range opts {
		o.applyMkdir(a)
	}
	return &FileAction{action: a}
}

// Mkdir makes a directory after a.
func (a *FileAction) Mkdir(p string, perm os.FileMode, opts ...MkdirOption) *FileAction {
	return a.then(Mkdir(p, perm, opts...))
}

// MkdirOption is an option of Mkdir.
type MkdirOption interface{ applyMkdir(*mkdir) }

type mkdirOption func(*mkdir)

func (o mkdirOption) applyMkdir(a *mkdir) { o(a) }

// WithParents makes missing parents, too, and accepts an existing directory.
func WithParents(v bool) MkdirOption { return mkdirOption(func(a *mkdir) { a.parents = v }) }

// madeInfo is what can be said of anything that is made.
type madeInfo struct {
	owner   *ChownOpt
	created *time.Time
}

type mkdir struct {
	madeInfo
	path    string
	perm    os.FileMode
	parents bool
}

func (a *mkdir) write(_ *fileWriter, fa *pb.FileAction, dir string, base int64) error {
	fa.Action = &pb.FileAction_Mkdir{Mkdir: &pb.FileActionMkDir{
		Path:        joinPath(dir, a.path, false),
		Mode:        int32(a.perm & 0o777),
		MakeParents: a.parents,
		Owner:       a.owner.toPB(base),
		Timestamp:   nanos(a.created),
	}}
	return nil
}

// Mkfile makes a file.
func Mkfile(p string, perm os.FileMode, data []byte, opts ...MkfileOption) *FileAction {
	a := &mkfile{path: p, perm: perm, data: data}
	for _, o := range opts {
		o.applyMkfile(a)
	}
	return &FileAction{action: a}
}

// Mkfile makes a file after a.
func (a *FileAction) Mkfile(p string, perm os.FileMode, data []byte, opts ...MkfileOption) *FileAction {
	return a.then(Mkfile(p, perm, data, opts...))
}

// MkfileOption is an option of Mkfile.
type MkfileOption interface{ applyMkfile(*mkfile) }

type mkfile struct {
	madeInfo
	path string
	perm os.FileMode
	data []byte
}

func (a *mkfile) write(_ *fileWriter, fa *pb.FileAction, dir string, base int64) error {
	fa.Action = &pb.FileAction_Mkfile{Mkfile: &pb.FileActionMkFile{
		Path:      joinPath(dir, a.path, false),
		Mode:      int32(a.perm & 0o777),
		Data:      a.data,
		Owner:     a.owner.toPB(base),
		Timestamp: nanos(a.created),
	}}
	return nil
}

// Symlink makes newPath, an absolute path, point to oldPath.
func Symlink(oldPath, newPath string, opts ...SymlinkOption) *FileAction {
	a := &symlink{from: oldPath, to: newPath}
	for _, o := range opts {
		o.applySymlink(a)
	}
	return &FileAction{action: a}
}

// Symlink makes a symlink after a.
func (a *FileAction) Symlink(oldPath, newPath string, opts ...SymlinkOption) *FileAction {
	return a.then(Symlink(oldPath, newPath, opts...))
}

// SymlinkOption is an option of Symlink.
type SymlinkOption interface{ applySymlink(*symlink) }

type symlink struct {
	madeInfo
	from, to string
}

func (a *symlink) write(w *fileWriter, fa *pb.FileAction, _ string, base int64) error {
	w.c.need(pb.CapFileSymlinkCreate)
	fa.Action = &pb.FileAction_Symlink{Symlink: &pb.FileActionSymlink{
		Oldpath:   a.from,
		Newpath:   a.to,
		Owner:     a.owner.toPB(base),
		Timestamp: nanos(a.created),
	}}
	return nil
}

// Rm removes a file or a directory with all it holds.
func Rm(p string, opts ...RmOption) *FileAction {
	a := &rm{path: p}
	for _, o := range opts {
		o(a)
	}
	return &FileAction{action: a}
}

// Rm removes a file or directory after a.
func (a *FileAction) Rm(p string, opts ...RmOption) *FileAction { return a.then(Rm(p, opts...)) }

// RmOption is an option of Rm.
type RmOption func(*rm)

// WithAllowNotFound accepts that there is nothing to remove.
func WithAllowNotFound(v bool) RmOption { return func(a *rm) { a.allowNotFound = v } }

// WithAllowWildcard takes the path as a pattern.
func WithAllowWildcard(v bool) RmOption { return func(a *rm) { a.allowWildcard = v } }

type rm struct {
	path          string
	allowNotFound bool
	allowWildcard bool
}

func (a *rm) write(w *fileWriter, fa *pb.FileAction, dir string, _ int64) error {
	if a.allowWildcard {
		w.c.need(pb.CapFileRmWildcard)
	}
	fa.Action = &pb.FileAction_Rm{Rm: &pb.FileActionRm{
		Path:          joinPath(dir, a.path, false),
		AllowNotFound: a.allowNotFound,
		AllowWildcard: a.allowWildcard,
	}}
	return nil
}

// CopyInput is what Copy copies from: a State, or a FileAction.WithState.
type CopyInput interface {
	// source makes the input the secondary one of fa and returns the
	// directory that relative paths are below.
	source(w *fileWriter, fa *pb.FileAction) (dir string, err error)
}

func (s State) source(w *fileWriter, fa *pb.FileAction) (string, error) {
	var err error
	fa.SecondaryInput, err = w.m.addInput(w.op, s.out)
	return s.dir, err
}

// WithState is the result of a on s as the source of a copy within the same
// operation.
func (a *FileAction) WithState(s State) CopyInput { return a.bind(s) }

func (a *boundAction) source(w *fileWriter, fa *pb.FileAction) (string, error) {
	i, err := w.add(a)
	if err != nil {
		return "", err
	}
	w.refer(&fa.SecondaryInput, i)
	return a.state.dir, nil
}

// Copy copies src of input to dest. An end of "/" or "/." matters.
func Copy(input CopyInput, src, dest string, opts ...CopyOption) *FileAction {
	a := &fileCopy{input: input, src: src, dest: dest}
	for _, o := range opts {
		o.applyCopy(&a.CopyInfo)
	}
	return &FileAction{action: a}
}

// Copy copies after a.
func (a *FileAction) Copy(input CopyInput, src, dest string, opts ...CopyOption) *FileAction {
	return a.then(Copy(input, src, dest, opts...))
}

// CopyOption is an option of Copy. A *CopyInfo is one that sets everything.
type CopyOption interface{ applyCopy(*CopyInfo) }

type copyOption func(*CopyInfo)

func (o copyOption) applyCopy(c *CopyInfo) { o(c) }

func (c *CopyInfo) applyCopy(other *CopyInfo) { *other = *c }

// CopyInfo says how to copy.
type CopyInfo struct {
	Mode                           *ChmodOpt // nil keeps the mode
	FollowSymlinks                 bool      // resolve links in src
	CopyDirContentsOnly            bool      // what a directory holds, not itself
	IncludePatterns                []string
	ExcludePatterns                []string
	RequiredPaths                  []string // must exist; with IncludePatterns
	AttemptUnpack                  bool     // extract src if it is an archive
	CreateDestPath                 bool     // make missing parents of dest
	AllowWildcard                  bool     // src is a pattern
	AllowEmptyWildcard             bool     // that may match nothing
	AlwaysReplaceExistingDestPaths bool     // a file may replace a directory and the other way round
	ChownOpt                       *ChownOpt
	CreatedTime                    *time.Time
}

// WithExcludePatterns leaves out what matches.
func WithExcludePatterns(patterns []string) CopyOption {
	return copyOption(func(c *CopyInfo) {
		c.ExcludePatterns = append(append([]string(nil), c.ExcludePatterns...), patterns...)
	})
}

// ChmodOpt is a mode, in numbers or, if ModeStr is set, as chmod takes it.
type ChmodOpt struct {
	Mode    os.FileMode
	ModeStr string
}

func (o ChmodOpt) applyCopy(c *CopyInfo) { c.Mode = &o }

type fileCopy struct {
	CopyInfo
	input     CopyInput
	src, dest string
}

func (a *fileCopy) write(w *fileWriter, fa *pb.FileAction, dir string, base int64) error {
	if a.input == nil {
		return fmt.Errorf("copy %s to %s: nothing to copy from", a.src, a.dest)
	}
	srcDir, err := a.input.source(w, fa)
	if err != nil {
		return err
	}
	src := path.Clean(a.src)
	if !path.IsAbs(src) {
		src = path.Join(srcDir, src)
	}
	c := &pb.FileActionCopy{
		Src:                              src,
		Dest:                             joinPath(dir, a.dest, true),
		Owner:                            a.ChownOpt.toPB(base),
		Mode:                             -1,
		FollowSymlink:                    a.FollowSymlinks,
		DirCopyContents:                  a.CopyDirContentsOnly,
		AttemptUnpackDockerCompatibility: a.AttemptUnpack,
		CreateDestPath:                   a.CreateDestPath,
		AllowWildcard:                    a.AllowWildcard,
		AllowEmptyWildcard:               a.AllowEmptyWildcard,
		Timestamp:                        nanos(a.CreatedTime),
		IncludePatterns:                  a.IncludePatterns,
		ExcludePatterns:                  a.ExcludePatterns,
		AlwaysReplaceExistingDestPaths:   a.AlwaysReplaceExistingDestPaths,
		RequiredPaths:                    a.RequiredPaths,
	}
	if m := a.CopyInfo.Mode; m != nil && m.ModeStr != "" {
		c.Mode, c.ModeStr = 0, m.ModeStr
	} else if m != nil {
		c.Mode = int32(m.Mode)
	}
	a.needCaps(&w.c)
	fa.Action = &pb.FileAction_Copy{Copy: c}
	return nil
}

// needCaps leaves out the mode string, whose capability no daemon announces.
func (a *fileCopy) needCaps(c *Constraints) {
	if len(a.IncludePatterns) > 0 || len(a.ExcludePatterns) > 0 {
		c.need(pb.CapFileCopyIncludeExcludePatterns)
	}
	if len(a.RequiredPaths) > 0 {
		c.need(pb.CapFileCopyRequiredPaths)
	}
	if a.AlwaysReplaceExistingDestPaths {
		c.need(pb.CapFileCopyAlwaysReplaceExistingDestPaths)
	}
}

// UserOpt is a user or group, by name or number.
type UserOpt struct {
	ID   int
	Name string
}

// ChownOpt is an owner. It is an option of every action that makes something.
type ChownOpt struct {
	User, Group *UserOpt
}

// WithUser is the owner "user" or "user:group", each a name or a number. Names
// are looked up in the state that is changed.
func WithUser(name string) ChownOpt {
	user, group, ok := strings.Cut(name, ":")
	opt := ChownOpt{User: parseUser(user)}
	if ok {
		opt.Group = parseUser(group)
	}
	return opt
}

func parseUser(name string) *UserOpt {
	if name == "root" {
		return &UserOpt{}
	}
	id, err := strconv.ParseInt(name, 10, 32)
	if err != nil {
		return &UserOpt{Name: name}
	}
	return &UserOpt{ID: int(id)}
}

// WithUIDGID is the owner by numbers.
func WithUIDGID(uid, gid int) ChownOpt {
	return ChownOpt{User: &UserOpt{ID: uid}, Group: &UserOpt{ID: gid}}
}

func (o ChownOpt) applyMkdir(a *mkdir)     { a.owner = &o }
func (o ChownOpt) applyMkfile(a *mkfile)   { a.owner = &o }
func (o ChownOpt) applySymlink(a *symlink) { a.owner = &o }
func (o ChownOpt) applyCopy(c *CopyInfo)   { c.ChownOpt = &o }

func (o *ChownOpt) toPB(base int64) *pb.ChownOpt {
	if o == nil {
		return nil
	}
	return &pb.ChownOpt{User: o.User.toPB(base), Group: o.Group.toPB(base)}
}

func (u *UserOpt) toPB(base int64) *pb.UserOpt {
	switch {
	case u == nil:
		return nil
	case u.Name != "":
		return &pb.UserOpt{User: &pb.UserOpt_ByName{ByName: &pb.NamedUserOpt{Name: u.Name, Input: base}}}
	}
	return &pb.UserOpt{User: &pb.UserOpt_ByID{ByID: uint32(u.ID)}}
}

// CreatedTime is the modification time of what an action makes.
type CreatedTime time.Time

// WithCreatedTime sets the time; without it, made things get the present and
// copies keep theirs.
func WithCreatedTime(t time.Time) CreatedTime { return CreatedTime(t) }

func (t CreatedTime) applyMkdir(a *mkdir)     { a.created = (*time.Time)(&t) }
func (t CreatedTime) applyMkfile(a *mkfile)   { a.created = (*time.Time)(&t) }
func (t CreatedTime) applySymlink(a *symlink) { a.created = (*time.Time)(&t) }
func (t CreatedTime) applyCopy(c *CopyInfo)   { c.CreatedTime = (*time.Time)(&t) }

// nanos returns a time as the wire has it; -1 leaves the time alone.
func nanos(t *time.Time) int64 {
	if t == nil {
		return -1
	}
	return t.UnixNano()
}
