package ops

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/internal/files"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
	"golang.org/x/sys/unix"
)

// placeTestSeeds is how many random states are changed in both ways.
const placeTestSeeds = 100

// What is written straight into a layer is what a mount of the snapshot would have
// written there, for random actions on random layers.
func TestFilePlaceIsAsMounted(t *testing.T) {
	defer unix.Umask(unix.Umask(0o022))
	m := newTestCache(t)
	placed, mounted := 0, 0
	for seed := range uint64(placeTestSeeds) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			w := &placeTest{rand.New(rand.NewPCG(seed, 1))}
			base := w.base(t, m)
			defer base.Release()
			for range 8 {
				actions := w.actions()
				if placeTestIsPlaced(t, m, base, actions[0]) {
					placed++
				} else {
					mounted++
				}
				since := time.Now().Add(-time.Second)
				got, err := fileTestOp(t, m, 1, actions...).Exec(t.Context(), nil, results(base))
				want, wantErr := fileTestOp(t, m, 1, placeTestMounted(actions)...).Exec(t.Context(), nil, results(base))
				what := placeTestNames(actions)
				if fmt.Sprint(err) != fmt.Sprint(wantErr) {
					t.Errorf("%s: error %v, through a mount %v", what, err, wantErr)
				} else if err == nil {
					placeTestSame(t, what, since, got[0], want[0])
				}
				for _, r := range append(got, want...) {
					r.Release()
				}
			}
		})
	}
	if total := placed + mounted; placed < total/4 || mounted < total/4 {
		t.Errorf("%d actions needed no mount and %d did: both ways have to be well used", placed, mounted)
	}
}

// placeTestIsPlaced says whether an action on base needs no mount.
func placeTestIsPlaced(t *testing.T, m *cache.Manager, base *cache.Ref, a *pb.FileAction) bool {
	u, err := m.New(t.Context(), base, cache.Options{})
	if err != nil {
		t.Fatal(err)
	}
	p, err := u.Place(t.Context(), fileActionPlace(a))
	if err == nil && p != nil {
		err = p.Close()
	}
	if err := errors.Join(err, u.Discard(t.Context())); err != nil {
		t.Fatal(err)
	}
	return p != nil
}

// placeTestMounted makes the actions come after one that does nothing, for which
// the state has to be mounted. What is mounted stays so.
func placeTestMounted(actions []*pb.FileAction) []*pb.FileAction {
	out := []*pb.FileAction{fileTestMkdir(0, -1, "/")}
	for i, a := range actions {
		copied := &pb.FileAction{Input: int64(i + 1), SecondaryInput: a.SecondaryInput, Output: a.Output, Action: a.Action}
		out = append(out, copied)
	}
	return out
}

func placeTestNames(actions []*pb.FileAction) string {
	var names []string
	for _, a := range actions {
		names = append(names, fileActionName(a))
	}
	return strings.Join(names, ", ")
}

func placeTestSame(t *testing.T, what string, since time.Time, got, want solver.Result) {
	t.Helper()
	for _, part := range []string{"layer", "tree"} {
		var dumps [2]string
		for i, r := range []solver.Result{got, want} {
			if dumps[i] = placeTestTree(t, r, since); part == "layer" {
				dumps[i] = placeTestLayer(t, r, since)
			}
		}
		if dumps[0] != dumps[1] {
			t.Errorf("%s: the %s is\n%s\nthrough a mount\n%s", what, part, dumps[0], dumps[1])
		}
	}
}

// placeTestLayer describes the own layer of a result.
func placeTestLayer(t *testing.T, r solver.Result, since time.Time) string {
	mounts, err := r.(Result).Ref.Mounts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, option := range mounts[0].Options {
		if lower, ok := strings.CutPrefix(option, "lowerdir="); ok {
			top, _, _ := strings.Cut(lower, ":")
			return placeTestDump(t, top, since)
		}
	}
	t.Fatalf("no layers in %v", mounts)
	return ""
}

func placeTestTree(t *testing.T, r solver.Result, since time.Time) string {
	v, err := r.(Result).Ref.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	return placeTestDump(t, v.Path(), since)
}

// placeTestDump describes all that is in dir, and dir, as exactly as it can be: of
// times later than since only that they are.
func placeTestDump(t *testing.T, dir string, since time.Time) string {
	var out []string
	err := filepath.WalkDir(dir+"/", func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		line, err := placeTestLine(p, since)
		out = append(out, strings.TrimPrefix(p, dir)+" "+line)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(out, "\n")
}

func placeTestLine(p string, since time.Time) (string, error) {
	var st unix.Stat_t
	if err := unix.Lstat(p, &st); err != nil {
		return "", err
	}
	line := fmt.Sprintf("%o %d:%d %x", st.Mode, st.Uid, st.Gid, st.Rdev)
	if at := st.Mtim.Nano(); at < since.UnixNano() {
		line += fmt.Sprintf(" of %d", at)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		data, err := os.ReadFile(p)
		if err != nil {
			return "", err
		}
		line += fmt.Sprintf(" %d %q", st.Nlink, data)
	case unix.S_IFLNK:
		link, err := os.Readlink(p)
		return line + " -> " + link, err
	case unix.S_IFCHR: // a whiteout
		return line, nil
	}
	f, err := os.OpenFile(p, unix.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	xattrs := files.XattrsOf(int(f.Fd()))
	names, err := xattrs.Names()
	for _, name := range names {
		value, _, err := xattrs.Get(name)
		if err != nil {
			return "", err
		}
		switch name {
		case "trusted.overlay.uuid", "trusted.overlay.impure": // of the mount, and that inode numbers are to be looked up
			continue
		case "trusted.overlay.origin": // where inode numbers are looked up
			value = nil
		}
		line += fmt.Sprintf(" %s=%q", name, value)
	}
	return line, err
}

// placeTest makes random states and actions.
type placeTest struct{ *rand.Rand }

func (w *placeTest) pick(from ...string) string { return from[w.IntN(len(from))] }

func (w *placeTest) path() string {
	p := ""
	for range 1 + w.IntN(4) {
		p += "/" + w.pick("a", "b", "c")
	}
	return p
}

// base is a state of some layers.
func (w *placeTest) base(t *testing.T, m *cache.Manager) (base *cache.Ref) {
	for range 2 + w.IntN(4) {
		below := base
		base = commitRef(t, m, below, func(dir string) {
			for range 3 + w.IntN(8) {
				if err := w.disturb(dir + w.path()); err != nil && !placeTestHarmless(err) {
					t.Fatal(err)
				}
			}
		})
		below.Release()
	}
	if w.IntN(3) > 0 {
		return base
	}
	other := commitRef(t, m, nil, func(dir string) {
		if err := errors.Join(os.MkdirAll(dir+"/a/b", 0o711), os.Mkdir(dir+"/c", 0o755)); err != nil {
			t.Fatal(err)
		}
	})
	defer other.Release()
	defer base.Release()
	merged, err := m.Merge(t.Context(), []*cache.Ref{other, base}, cache.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return merged
}

// placeTestHarmless: something else is there, or nothing, or it can't have xattrs.
func placeTestHarmless(err error) bool {
	for _, e := range []error{fs.ErrExist, fs.ErrNotExist, unix.ENOTDIR, unix.ELOOP, unix.EISDIR, unix.EPERM} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// disturb does something random at p.
func (w *placeTest) disturb(p string) error {
	if w.IntN(2) > 0 {
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			return err
		}
	}
	ts := unix.NsecToTimespec(1e18 + w.Int64N(1e15))
	touch := func(at string) error {
		return unix.UtimesNanoAt(unix.AT_FDCWD, at, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
	}
	switch w.IntN(12) {
	case 0, 1, 2, 3:
		err := os.Mkdir(p, 0o755)
		if err == nil {
			err = errors.Join(os.Chown(p, w.IntN(3), w.IntN(3)), unix.Chmod(p, []uint32{0o755, 0o700, 0o2775, 0o1777}[w.IntN(4)]))
		}
		return cmp.Or(err, touch(p))
	case 4, 5:
		if err := os.RemoveAll(p); err != nil {
			return err
		}
		return os.WriteFile(p, []byte("x"), 0o644)
	case 6:
		return cmp.Or(os.RemoveAll(p), os.Mkdir(p, 0o750))
	case 7:
		return os.RemoveAll(p)
	case 8:
		return os.Symlink(w.pick("a", "b", "../c", "missing"), p)
	case 9:
		return unix.Lsetxattr(p, "user.x", []byte{byte(w.IntN(256))}, 0)
	case 10:
		if w.IntN(3) > 0 {
			return touch(p)
		}
		if w.IntN(2) > 0 {
			p = filepath.Dir(p) // which may be the root
		}
		acl := "\x02\x00\x00\x00" + "\x01\x00\x07\x00\xff\xff\xff\xff" + "\x04\x00\x07\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff"
		if st, err := os.Stat(p); err != nil || !st.IsDir() {
			return err
		}
		return unix.Setxattr(p, "system.posix_acl_default", []byte(acl), 0)
	}
	return touch(filepath.Dir(p))
}

// actions are some in a row on the first input, the last making the output.
func (w *placeTest) actions() []*pb.FileAction {
	actions := make([]*pb.FileAction, 1+w.IntN(3))
	for i := range actions {
		input, output := int64(i), int64(-1) // the state before: there is one input
		if i == len(actions)-1 {
			output = 0
		}
		actions[i] = w.action(input, output)
	}
	return actions
}

func (w *placeTest) action(in, out int64) *pb.FileAction {
	p, when, perm := w.path(), int64(-1), []int32{0o644, 0o700, 0o777}[w.IntN(3)]
	if w.IntN(4) == 0 {
		when = 1e18 + w.Int64N(1e15)
	}
	if w.IntN(10) == 0 {
		p += w.pick("/../d", "/", "/./e", "//f")
	}
	var owner *pb.ChownOpt
	if w.IntN(4) == 0 {
		owner = &pb.ChownOpt{User: &pb.UserOpt{User: &pb.UserOpt_ByID{ByID: w.Uint32N(3)}}}
	}
	a := &pb.FileAction{Input: in, SecondaryInput: -1, Output: out}
	switch w.IntN(8) {
	case 0, 1:
		a.Action = &pb.FileAction_Mkdir{Mkdir: &pb.FileActionMkDir{Path: p, Mode: perm, Timestamp: when, Owner: owner}}
	case 2:
		a.Action = &pb.FileAction_Mkdir{Mkdir: &pb.FileActionMkDir{Path: p + "/x/y", Mode: perm, Timestamp: when, Owner: owner, MakeParents: true}}
	case 3:
		a.Action = &pb.FileAction_Symlink{Symlink: &pb.FileActionSymlink{Oldpath: "to", Newpath: p, Timestamp: when, Owner: owner}}
	case 4:
		a.Action = &pb.FileAction_Rm{Rm: &pb.FileActionRm{Path: p, AllowNotFound: true}}
	default:
		a.Action = &pb.FileAction_Mkfile{Mkfile: &pb.FileActionMkFile{Path: p, Mode: perm, Data: []byte("new"), Timestamp: when, Owner: owner}}
	}
	return a
}
