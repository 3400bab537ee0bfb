// Package snapshottest holds what every snapshotter must do.
package snapshottest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/snapshot"
)

// Root fails the test if it doesn't run as root, without which there are no
// mounts.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts, and needs to run as root")
	}
}

// OpenDB opens a store under root, that is closed when the test ends.
func OpenDB(t testing.TB, root string) *store.DB {
	t.Helper()
	db, err := store.Open(store.Options{Root: root, Warn: func(msg string, args ...any) { t.Log("store:", msg, args) }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return db
}

// Run tests the snapshotters that open makes under a root, with their records in
// db. Called again with the same root and a new db, as after a restart, it opens
// what is there.
func Run(t *testing.T, open func(t *testing.T, root string, db *store.DB) snapshot.Snapshotter) {
	Root(t)
	for name, test := range map[string]func(*suite){
		"chain":            (*suite).chain,
		"errors":           (*suite).errors,
		"ids":              (*suite).ids,
		"readonly":         (*suite).readonly,
		"reopen":           (*suite).reopen,
		"deletions":        (*suite).deletions,
		"root metadata":    (*suite).rootMetadata,
		"stack":            (*suite).stack,
		"stack of layers":  (*suite).stackOfLayers,
		"stack on nothing": (*suite).stackOnNothing,
		"diff stack":       (*suite).diffStack,
		"remove":           (*suite).remove,
		"restart":          (*suite).restart,
		"walk":             (*suite).walk,
		"usage":            (*suite).usage,
		"deep chain":       (*suite).deepChain,
		"mounted again":    (*suite).mountedAgain,
		"shared view":      (*suite).sharedView,
	} {
		t.Run(name, func(t *testing.T) {
			s := &suite{T: t, root: t.TempDir(), new: open}
			s.open()
			defer s.close()
			test(s)
		})
	}
}

type suite struct {
	*testing.T
	snapshot.Snapshotter
	db   *store.DB
	root string
	new  func(t *testing.T, root string, db *store.DB) snapshot.Snapshotter
}

func (s *suite) open() {
	var err error
	if s.db, err = store.Open(store.Options{Root: s.root}); err != nil {
		s.Fatal(err)
	}
	s.Snapshotter = s.new(s.T, s.root, s.db)
}

func (s *suite) close() {
	s.Helper()
	if err := s.db.Close(); err != nil {
		s.Error(err)
	}
	if c, ok := s.Snapshotter.(interface{ Close() error }); ok {
		if err := c.Close(); err != nil {
			s.Error(err)
		}
	}
}

// Stack is the snapshotter's, for tests that don't care what grows.
func (s *suite) Stack(ctx context.Context, id string, layers []string) error {
	_, err := s.Snapshotter.Stack(ctx, id, layers)
	return err
}

func (s *suite) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

func (s *suite) want(err, target error) {
	s.Helper()
	if !errors.Is(err, target) {
		s.Errorf("got error %v, want %v", err, target)
	}
}

// in calls fn with a directory where id is visible.
func (s *suite) in(id string, readonly bool, fn func(dir string)) {
	s.Helper()
	mounts, err := s.Mounts(s.Context(), id, readonly)
	s.must(err)
	v, err := snapshot.Open(mounts)
	s.must(err)
	defer func() { s.must(v.Close()) }()
	fn(v.Path())
}

// layer makes the committed snapshot id on parent, with what script does.
// A script is words: "file" writes a file whose content is id, "dir/" makes a
// directory, "-name" removes.
func (s *suite) layer(id, parent, script string) {
	s.Helper()
	s.must(s.Prepare(s.Context(), id, parent))
	s.write(id, script)
	s.must(s.Commit(s.Context(), id))
}

func (s *suite) write(id, script string) {
	s.Helper()
	s.in(id, false, func(dir string) {
		for _, w := range strings.Fields(script) {
			name, remove := strings.CutPrefix(w, "-")
			path := filepath.Join(dir, name)
			switch {
			case remove:
				s.must(os.RemoveAll(path))
			case strings.HasSuffix(w, "/"):
				s.must(os.MkdirAll(path, 0o755))
			default:
				s.must(os.MkdirAll(filepath.Dir(path), 0o755))
				s.must(os.WriteFile(path, []byte(id), 0o644))
			}
		}
	})
}

// shows checks what is visible in id: "dir/ dir/file=content".
func (s *suite) shows(id, want string) {
	s.Helper()
	s.in(id, true, func(dir string) {
		if got := Listing(s.T, dir); got != want {
			s.Errorf("%s shows %q, want %q", id, got, want)
		}
	})
}

// Listing describes the files below dir in one line: "dir/ dir/file=content".
func Listing(t testing.TB, dir string) string {
	t.Helper()
	var out []string
	root := os.DirFS(dir)
	err := fs.WalkDir(root, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == "." {
			return err
		}
		if d.IsDir() {
			out = append(out, path+"/")
			return nil
		}
		data, err := fs.ReadFile(root, path)
		out = append(out, path+"="+string(data))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func (s *suite) chain() {
	s.layer("a", "", "x d/y")
	s.layer("b", "a", "d/y d/z")
	s.must(s.Prepare(s.Context(), "c", "b"))
	s.write("c", "-x w")
	s.shows("a", "d/ d/y=a x=a")
	s.shows("b", "d/ d/y=b d/z=b x=a")
	s.shows("c", "d/ d/y=b d/z=b w=c")
	info, err := s.Stat(s.Context(), "c")
	s.must(err)
	if info != (snapshot.Info{ID: "c", Parent: "b"}) {
		s.Errorf("info %+v", info)
	}
	s.must(s.Commit(s.Context(), "c"))
	if info, _ := s.Stat(s.Context(), "c"); !info.Committed {
		s.Error("it isn't committed")
	}
	s.shows("c", "d/ d/y=b d/z=b w=c")
}

func (s *suite) errors() {
	ctx := s.Context()
	s.layer("a", "", "")
	s.must(s.Prepare(ctx, "act", ""))
	s.want(s.Prepare(ctx, "a", ""), snapshot.ErrExists)
	s.want(s.Stack(ctx, "a", []string{"a"}), snapshot.ErrExists)
	s.want(s.Prepare(ctx, "b", "none"), snapshot.ErrNotFound)
	if err := s.Prepare(ctx, "b", "act"); err == nil {
		s.Error("an active parent is taken")
	}
	if err := s.Stack(ctx, "b", []string{"a", "act"}); err == nil {
		s.Error("an active layer is taken")
	}
	s.want(s.Stack(ctx, "b", []string{"a", "none"}), snapshot.ErrNotFound)
	if err := s.Stack(ctx, "b", nil); err == nil {
		s.Error("a stack of nothing")
	}
	s.want(s.Commit(ctx, "a"), snapshot.ErrNotActive)
	s.want(s.Commit(ctx, "none"), snapshot.ErrNotFound)
	s.want(s.Reopen(ctx, "none"), snapshot.ErrNotFound)
	s.want(s.Persist(&store.Batch{}, "none"), snapshot.ErrNotFound)
	s.must(s.Remove(&store.Batch{}, "none"))
	for _, err := range []error{
		second(s.Mounts(ctx, "none", false)), second(s.Stat(ctx, "none")), second(s.Usage(ctx, "none")),
	} {
		s.want(err, snapshot.ErrNotFound)
	}
	// None of it left anything behind.
	s.must(s.Prepare(ctx, "b", "a"))
	b := &store.Batch{}
	s.must(s.Remove(b, "b"))
	s.must(s.Remove(b, "a"))
}

func second[T any](_ T, err error) error { return err }

func (s *suite) ids() {
	for _, id := range []string{"", ".", "..", "a/b", "../a", "/a", "a b", "ä", "a\x00b", "-x", strings.Repeat("x", 65)} {
		if s.Prepare(s.Context(), id, "") == nil || s.Stack(s.Context(), id, []string{id}) == nil {
			s.Errorf("id %q is taken", id)
		}
	}
	s.must(s.Prepare(s.Context(), "0aZ_.-"+strings.Repeat("x", 58), ""))
}

func (s *suite) readonly() {
	s.layer("a", "", "x")
	s.layer("b", "a", "y")
	s.must(s.Prepare(s.Context(), "c", "b"))
	s.must(s.Prepare(s.Context(), "d", ""))
	for _, id := range []string{"a", "b", "c", "d"} {
		for _, readonly := range []bool{true, false} {
			s.in(id, readonly, func(dir string) {
				err := os.WriteFile(dir+"/w", nil, 0o644)
				if writable := !readonly && (id == "c" || id == "d"); (err == nil) != writable {
					s.Errorf("%s, readonly %v: writing gives %v", id, readonly, err)
				}
			})
		}
	}
}

func (s *suite) reopen() {
	ctx := s.Context()
	s.layer("a", "", "x")
	s.layer("b", "a", "y")
	s.want(s.Reopen(ctx, "a"), snapshot.ErrInUse)
	s.must(s.Reopen(ctx, "b"))
	s.write("b", "z -x")
	s.shows("b", "y=b z=b")
	s.must(s.Commit(ctx, "b"))
	s.layer("c", "b", "w")
	s.shows("c", "w=c y=b z=b")
	s.must(s.Remove(&store.Batch{}, "c"))
	s.must(s.Reopen(ctx, "b"))
	s.must(s.Stack(ctx, "st", []string{"a"}))
	if s.Reopen(ctx, "st") == nil {
		s.Error("a stack was reopened")
	}
}

func (s *suite) deletions() {
	s.layer("a", "", "x d/y d/sub/z e/1 e/2")
	s.layer("b", "a", "-x -d d/new -e e")
	s.shows("b", "d/ d/new=b e=b")
	s.layer("c", "b", "-e e/3")
	s.shows("c", "d/ d/new=b e/ e/3=c")
}

func (s *suite) rootMetadata() {
	s.layer("a", "", "x")
	s.must(s.Prepare(s.Context(), "b", "a"))
	s.in("b", false, func(dir string) {
		s.must(os.Chown(dir, 12, 34))
		s.must(os.Chmod(dir, os.ModeSticky|0o777))
	})
	s.must(s.Commit(s.Context(), "b"))
	s.layer("c", "b", "y")
	s.in("c", true, func(dir string) {
		st, err := os.Stat(dir)
		s.must(err)
		if st.Mode() != os.ModeDir|os.ModeSticky|0o777 {
			s.Errorf("the root has mode %v", st.Mode())
		}
	})
}

func (s *suite) stack() {
	ctx := s.Context()
	s.layer("base", "", "x d/y")
	s.layer("a", "base", "d/a -x")
	s.layer("b", "base", "d/b")
	// A merge of a and b, whose base comes twice and counts the second time.
	s.must(s.Stack(ctx, "m", []string{"base", "a", "base", "b"}))
	s.shows("m", "d/ d/a=a d/b=b d/y=base x=base")
	s.must(s.Stack(ctx, "n", []string{"base", "b", "a"}))
	s.shows("n", "d/ d/a=a d/b=b d/y=base")
	info, err := s.Stat(ctx, "m")
	s.must(err)
	if info != (snapshot.Info{ID: "m", Committed: true}) {
		s.Errorf("info %+v", info)
	}
	s.want(s.Remove(&store.Batch{}, "b"), snapshot.ErrInUse)
	s.want(s.Reopen(ctx, "b"), snapshot.ErrInUse)
	s.must(s.Prepare(ctx, "top", "m"))
	s.write("top", "-d/y d/top")
	s.shows("top", "d/ d/a=a d/b=b d/top=top x=base")
	s.must(s.Commit(ctx, "top"))
	s.layer("top2", "top", "t2")
	s.shows("top2", "d/ d/a=a d/b=b d/top=top t2=top2 x=base")
}

func (s *suite) stackOfLayers() {
	ctx := s.Context()
	s.layer("a", "", "a x")
	s.layer("b", "", "b x")
	s.layer("c", "", "c x")
	s.must(s.Stack(ctx, "ab", []string{"a", "b"}))
	s.layer("d", "ab", "d")
	s.must(s.Stack(ctx, "cab", []string{"c", "ab"}))
	s.shows("cab", "a=a b=b c=c x=b")
	s.must(s.Stack(ctx, "all", []string{"ab", "c", "d"}))
	s.shows("all", "a=a b=b c=c d=d x=c")
	s.must(s.Stack(ctx, "one", []string{"a"}))
	s.shows("one", "a=a x=a")
}

// A layer in which things were deleted, shown without what they were deleted
// from.
func (s *suite) stackOnNothing() {
	s.layer("a", "", "x d/y d/sub/z e/1")
	s.layer("b", "a", "-x -d/sub/z d/w -e e/2 p/q")
	s.must(s.Stack(s.Context(), "s", []string{"b"}))
	s.shows("s", "d/ d/sub/ d/w=b e/ e/2=b p/ p/q=b")
	s.layer("other", "", "o")
	s.must(s.Stack(s.Context(), "t", []string{"other", "b"}))
	s.shows("t", "d/ d/sub/ d/w=b e/ e/2=b o=other p/ p/q=b")
}

// The difference between a snapshot and its ancestor, put on something else.
func (s *suite) diffStack() {
	s.layer("a", "", "x d/y")
	s.layer("b", "a", "b d/y")
	s.layer("c", "b", "-x c")
	s.layer("base", "", "x z d/w")
	s.must(s.Stack(s.Context(), "diff", []string{"b", "c"}))
	s.must(s.Stack(s.Context(), "m", []string{"base", "diff"}))
	s.shows("m", "b=b c=c d/ d/w=base d/y=b z=base")
}

func (s *suite) remove() {
	ctx := s.Context()
	s.layer("a", "", "x")
	s.layer("b", "a", "y")
	b := &store.Batch{}
	s.want(s.Remove(b, "a"), snapshot.ErrInUse)
	s.must(s.Persist(b, "b"))
	s.db.Write(b)
	s.must(s.db.Sync(ctx))
	b = &store.Batch{}
	s.must(s.Remove(b, "b"))
	s.want(second(s.Stat(ctx, "b")), snapshot.ErrNotFound)
	s.must(s.Remove(b, "a"))
	s.db.Write(b)
	s.must(s.db.Sync(ctx))
	s.must(s.Walk(func(i snapshot.Info) error { return fmt.Errorf("%s is still there", i.ID) }))
}

func (s *suite) restart() {
	ctx := s.Context()
	s.layer("a", "", "x")
	s.layer("b", "a", "y")
	s.must(s.Prepare(ctx, "cache", "a"))
	s.write("cache", "kept")
	s.must(s.Stack(ctx, "st", []string{"a", "b"}))
	s.layer("c", "b", "z")
	s.must(s.Prepare(ctx, "lost", ""))
	b := &store.Batch{}
	for _, id := range []string{"b", "cache", "st"} { // and a with them
		s.must(s.Persist(b, id))
	}
	s.db.Write(b)
	// Committed and reopened snapshots are stored as what they are now.
	s.must(s.Commit(ctx, "cache"))
	b = &store.Batch{}
	s.must(s.Persist(b, "cache"))
	s.db.Write(b)

	s.close()
	s.open()
	n, err := s.Sweep(ctx)
	s.must(err)
	if n != 2 {
		s.Errorf("swept %d snapshots, want c and lost", n)
	}
	s.shows("b", "x=a y=b")
	s.shows("st", "x=a y=b")
	s.shows("cache", "kept=cache x=a")
	s.want(second(s.Stat(ctx, "c")), snapshot.ErrNotFound)
	s.want(s.Remove(&store.Batch{}, "a"), snapshot.ErrInUse)
	if info, _ := s.Stat(ctx, "cache"); !info.Committed {
		s.Error("the commit was forgotten")
	}
	if n, err := s.Sweep(ctx); n != 0 || err != nil {
		s.Errorf("a second sweep: %d, %v", n, err)
	}
	s.layer("c", "b", "new")
	s.shows("c", "new=c x=a y=b")
}

func (s *suite) walk() {
	s.layer("z", "", "")
	s.layer("y", "z", "")
	s.layer("x", "y", "")
	s.must(s.Stack(s.Context(), "a", []string{"x", "z"}))
	s.must(s.Prepare(s.Context(), "b", "a"))
	seen := map[string]bool{"": true}
	s.must(s.Walk(func(i snapshot.Info) error {
		if !seen[i.Parent] {
			s.Errorf("%s comes before its parent %s", i.ID, i.Parent)
		}
		if i.ID == "a" && !seen["x"] {
			s.Error("a comes before its layer")
		}
		seen[i.ID] = true
		return nil
	}))
	if len(seen) != 6 {
		s.Errorf("walked %v", seen)
	}
	stop := errors.New("stop")
	s.want(s.Walk(func(snapshot.Info) error { return stop }), stop)
}

func (s *suite) usage() {
	ctx := s.Context()
	s.must(s.Prepare(ctx, "a", ""))
	empty, err := s.Usage(ctx, "a")
	s.must(err)
	s.in("a", false, func(dir string) {
		s.must(os.WriteFile(dir+"/big", make([]byte, 1<<20), 0o644))
		s.must(os.Link(dir+"/big", dir+"/again"))
		s.must(os.Mkdir(dir+"/d", 0o755))
		sparse, err := os.Create(dir + "/d/sparse")
		s.must(err)
		s.must(sparse.Truncate(1 << 40))
		s.must(sparse.Close())
	})
	u, err := s.Usage(ctx, "a")
	s.must(err)
	if grown := u.Size - empty.Size; grown < 1<<20 || grown > 1<<20+64<<10 {
		s.Errorf("a file of 1 MiB takes %d bytes", grown)
	}
	if u.Inodes-empty.Inodes != 3 {
		s.Errorf("%d inodes, want 3 more than %d", u.Inodes, empty.Inodes)
	}
	s.must(s.Commit(ctx, "a"))
	s.layer("b", "a", "small")
	if u, err := s.Usage(ctx, "b"); err != nil || u.Size >= 1<<20 {
		s.Errorf("usage of a child: %+v, %v", u, err)
	}
	s.must(s.Stack(ctx, "st", []string{"a", "b"}))
	if u, err := s.Usage(ctx, "st"); err != nil || u != (snapshot.Usage{}) {
		s.Errorf("usage of a stack: %+v, %v", u, err)
	}
}

func (s *suite) deepChain() {
	parent, want := "", []string{}
	for i := range 60 {
		id := fmt.Sprintf("layer%03d", i)
		s.layer(id, parent, id)
		want = append(want, id+"="+id)
		parent = id
	}
	s.shows(parent, strings.Join(want, " "))
	s.layer("top", parent, "-layer000")
	s.shows("top", strings.Join(want[1:], " "))
}

// A volatile overlay can't be mounted again unless something is done for it.
func (s *suite) mountedAgain() {
	s.layer("a", "", "x")
	s.must(s.Prepare(s.Context(), "b", "a"))
	mounts, err := s.Mounts(s.Context(), "b", false)
	s.must(err)
	for i := range 3 {
		v, err := snapshot.Open(mounts)
		s.must(err)
		s.must(os.WriteFile(fmt.Sprint(v.Path(), "/", i), nil, 0o644))
		s.must(v.Close())
	}
	s.write("b", "again")
	s.shows("b", "0= 1= 2= again=b x=a")
}

func (s *suite) sharedView() {
	s.layer("a", "", "x")
	s.must(s.Prepare(s.Context(), "b", "a"))
	s.in("b", false, func(one string) {
		s.in("b", false, func(two string) {
			s.must(os.WriteFile(one+"/1", []byte("one"), 0o644))
			s.must(os.WriteFile(two+"/x", []byte("two"), 0o644))
			s.must(os.Remove(two + "/1"))
			for _, dir := range []string{one, two} {
				if got := Listing(s.T, dir); got != "x=two" {
					s.Errorf("a view shows %q", got)
				}
			}
		})
		s.must(os.WriteFile(one+"/2", []byte("one"), 0o644))
	})
	s.shows("b", "2=one x=two")
}
