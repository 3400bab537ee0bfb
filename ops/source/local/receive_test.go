package local

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/cache/contenthash"
	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"
	"golang.org/x/sys/unix"
)

// pipe is one end of an in-memory stream.
type pipe struct {
	ctx  context.Context
	in   <-chan []byte
	out  chan<- []byte
	once *sync.Once
}

// newPipe returns the receiver's and the sender's end.
func newPipe(ctx context.Context) (*pipe, *pipe) {
	a, b := make(chan []byte, 16), make(chan []byte, 16)
	return &pipe{ctx, a, b, new(sync.Once)}, &pipe{ctx, b, a, new(sync.Once)}
}

func (p *pipe) Context() context.Context { return p.ctx }

func (p *pipe) SendMsg(m any) error {
	raw, err := m.(*types.Packet).MarshalVT()
	if err != nil {
		return err
	}
	select {
	case p.out <- raw:
		return nil
	case <-p.ctx.Done():
		return p.ctx.Err()
	}
}

func (p *pipe) RecvMsg(m any) error {
	select {
	case raw, ok := <-p.in:
		if !ok {
			return io.EOF
		}
		return m.(*types.Packet).UnmarshalVT(raw)
	case <-p.ctx.Done():
		return p.ctx.Err()
	}
}

func (p *pipe) close() { p.once.Do(func() { close(p.out) }) }

// records is a recorder that remembers.
type records struct {
	mu sync.Mutex
	m  map[string]contenthash.Entry
}

func (r *records) Set(e contenthash.Entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !e.Mode.IsDir() {
		r.removeLocked(e.Path)
	}
	r.m[e.Path] = e
}

func (r *records) Remove(path string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.removeLocked(path)
}

func (r *records) removeLocked(path string) {
	maps.DeleteFunc(r.m, func(p string, _ contenthash.Entry) bool { return p == path || below(p, path) })
}

// copyOf is the daemon's side of a directory: what a record holds.
type copyOf struct {
	dir   string
	state []byte
	rec   *records
}

func newCopy(t testing.TB) *copyOf {
	return &copyOf{dir: t.TempDir(), rec: &records{m: map[string]contenthash.Entry{}}}
}

func (c *copyOf) receiver(t testing.TB) *receiver {
	t.Helper()
	old, err := openState(c.state)
	if err != nil {
		t.Fatal(err)
	}
	return &receiver{old: old, open: func() (*place, error) {
		root, err := unix.Open(c.dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		t.Cleanup(func() { unix.Close(root) })
		return &place{root: root, rec: c.rec}, nil
	}}
}

// sync transfers src as the real client does and returns whether anything
// changed.
func (c *copyOf) sync(t testing.TB, src string, set ...func(*receiver)) bool {
	t.Helper()
	r := c.receiver(t)
	for _, f := range set {
		f(r)
	}
	if err := transferFrom(t, r, src); err != nil {
		t.Fatal(err)
	}
	c.state = r.state.encode()
	return r.changed
}

func transferFrom(t testing.TB, r *receiver, src string) error {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	mine, theirs := newPipe(ctx)
	tree, err := fsutil.NewFS(src)
	if err != nil {
		t.Fatal(err)
	}
	sent := make(chan error, 1)
	go func() {
		err := fsutil.Send(ctx, theirs, tree, nil)
		theirs.close()
		sent <- err
	}()
	err = r.run(ctx, mine)
	cancel()
	if serr := <-sent; err == nil && serr != nil {
		t.Fatalf("sender: %v", serr)
	}
	return err
}

// describe lists a tree: type, mode, owner, times, links, content, xattrs.
func describe(t testing.TB, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	inodes := map[uint64]string{}
	err := filepath.WalkDir(dir+"/", func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil || rel == "." {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		text := fmt.Sprintf("%o %d:%d %d", st.Mode, st.Uid, st.Gid, st.Mtim.Nano())
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			text += fmt.Sprintf(" %d %x", st.Size, sha256.Sum256(data))
			if first, ok := inodes[st.Ino]; ok && st.Nlink > 1 {
				text += " = " + first
			}
			inodes[st.Ino] = rel
		case unix.S_IFLNK:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			text += " -> " + target
		case unix.S_IFCHR, unix.S_IFBLK:
			text += fmt.Sprintf(" dev %d", st.Rdev)
		}
		buf := make([]byte, 256)
		if n, err := unix.Lgetxattr(p, "user.test", buf); err == nil {
			text += " xattr " + string(buf[:n])
		}
		out[rel] = text
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func sameTrees(t testing.TB, want, got map[string]string) {
	t.Helper()
	for p, w := range want {
		if g, ok := got[p]; !ok {
			t.Errorf("%s: missing", p)
		} else if g != w {
			t.Errorf("%s:\n got %s\nwant %s", p, g, w)
		}
	}
	for p := range got {
		if _, ok := want[p]; !ok {
			t.Errorf("%s: shouldn't be there", p)
		}
	}
}

// checkRecords compares the recorded digests with those of the files.
func (c *copyOf) checkRecords(t testing.TB) {
	t.Helper()
	seen := 0
	err := filepath.WalkDir(c.dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(c.dir, p)
		if err != nil || rel == "." {
			return err
		}
		seen++
		e, ok := c.rec.m[rel]
		if !ok {
			t.Errorf("%s: no digest recorded", rel)
			return nil
		}
		if e.Linkname != "" && e.Mode.IsRegular() {
			return nil // takes the digest of its target
		}
		header, err := contenthash.Header(e)
		if err != nil {
			return err
		}
		h := sha256.New()
		h.Write(header)
		if e.Mode.IsRegular() {
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			h.Write(data)
		}
		if want := hex.EncodeToString(h.Sum(nil)); e.Digest.Encoded() != want {
			t.Errorf("%s: recorded %s, want %s", rel, e.Digest, want)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if seen != len(c.rec.m) {
		t.Errorf("%d digests recorded for %d files", len(c.rec.m), seen)
	}
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this test must run as root: it makes devices and changes owners")
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func write(t testing.TB, path, data string, mode os.FileMode) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(t, os.WriteFile(path, []byte(data), 0o644))
	must(t, os.Chmod(path, mode))
}

// fill makes one of everything.
func fill(t testing.TB, dir string) {
	t.Helper()
	at := func(p string) string { return filepath.Join(dir, p) }
	write(t, at("a"), "hello", 0o644)
	write(t, at("empty"), "", 0o600)
	write(t, at("big"), strings.Repeat("0123456789abcdef", 20_000), 0o444)
	write(t, at("d/x"), "x", 0o4755)
	write(t, at("d/e/f/deep"), "deep", 0o640)
	write(t, at("d.txt"), "sorts between d and its children as a string", 0o644)
	must(t, os.Mkdir(at("emptydir"), 0o700))
	must(t, os.Mkdir(at("sticky"), 0o755))
	must(t, os.Chmod(at("sticky"), 0o777|os.ModeSticky))
	must(t, os.Mkdir(at("group"), 0o755))
	must(t, os.Chown(at("group"), 12, 34))
	must(t, os.Chmod(at("group"), 0o775|os.ModeSetgid))
	write(t, at("group/in"), "in", 0o644)
	must(t, os.Chown(at("group/in"), 0, 0))
	must(t, os.Mkdir(at("group/sub"), 0o755))
	must(t, os.Chown(at("group/sub"), 0, 0))
	must(t, os.Chmod(at("group/sub"), 0o755))
	must(t, os.Chown(at("a"), 1000, 1001))
	must(t, os.Symlink("a", at("link")))
	must(t, os.Symlink("/etc/passwd", at("absolute")))
	must(t, os.Symlink("../../outside", at("d/out")))
	must(t, os.Lchown(at("link"), 5, 6))
	must(t, os.Link(at("big"), at("d/hard")))
	must(t, unix.Mkfifo(at("fifo"), 0o622))
	must(t, unix.Mknod(at("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(t, unix.Mknod(at("block"), unix.S_IFBLK|0o660, int(unix.Mkdev(7, 9))))
	must(t, unix.Lsetxattr(at("a"), "user.test", []byte("value"), 0))
	must(t, unix.Lsetxattr(at("d"), "user.test", []byte("dir"), 0))
	old := time.Unix(1_000_000_000, 123_456_789)
	must(t, os.Chtimes(at("a"), old, old))
	must(t, os.Chtimes(at("d/e"), old, old))
	must(t, os.Chtimes(at("emptydir"), old, old))
}

// compat: SES-033, SES-036, SES-043, SES-044
func TestTransfer(t *testing.T) {
	needRoot(t)
	src, c := t.TempDir(), newCopy(t)
	fill(t, src)
	at := func(p string) string { return filepath.Join(src, p) }
	steps := []struct {
		name   string
		change func()
	}{
		{"first", func() {}},
		{"content", func() { write(t, at("d/x"), "other", 0o755) }},
		{"mode", func() { must(t, os.Chmod(at("a"), 0o600)) }},
		{"owner", func() { must(t, os.Chown(at("d/e"), 7, 8)) }},
		{"mtime", func() { must(t, os.Chtimes(at("a"), time.Time{}, time.Unix(5, 6))) }},
		{"xattr", func() { must(t, unix.Lsetxattr(at("a"), "user.test", []byte("new"), 0)) }},
		{"xattr of a directory gone", func() { must(t, unix.Lremovexattr(at("d"), "user.test")) }},
		{"new file", func() { write(t, at("d/e/new"), "new", 0o644) }},
		{"new directory", func() { write(t, at("z/y/x"), "zyx", 0o644) }},
		{"deleted file", func() { must(t, os.Remove(at("d/e/f/deep"))) }},
		{"deleted tree", func() { must(t, os.RemoveAll(at("d/e"))) }},
		{"file to directory", func() { must(t, os.Remove(at("d/x"))); write(t, at("d/x/in"), "in", 0o644) }},
		{"directory to file", func() { must(t, os.RemoveAll(at("z"))); write(t, at("z"), "z", 0o644) }},
		{"directory to symlink", func() { must(t, os.RemoveAll(at("d/x"))); must(t, os.Symlink("/tmp", at("d/x"))) }},
		{"symlink to directory", func() { must(t, os.Remove(at("d/x"))); write(t, at("d/x/in"), "again", 0o644) }},
		{"symlink elsewhere", func() { must(t, os.Remove(at("link"))); must(t, os.Symlink("big", at("link"))) }},
		{"fifo to file", func() { must(t, os.Remove(at("fifo"))); write(t, at("fifo"), "", 0o644) }},
		{"device number", func() {
			must(t, os.Remove(at("null")))
			must(t, unix.Mknod(at("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))))
		}},
		{"hard linked content", func() { must(t, os.Chmod(at("big"), 0o644)); write(t, at("big"), "small now", 0o644) }},
		{"hard link broken", func() { must(t, os.Remove(at("d/hard"))); write(t, at("d/hard"), "own", 0o644) }},
		{"hard link made", func() { must(t, os.Remove(at("d/hard"))); must(t, os.Link(at("big"), at("d/hard"))) }},
		{"hard link target gone", func() { must(t, os.Remove(at("big"))) }},
		{"emptied", func() {
			for _, e := range must1(os.ReadDir(src)) {
				must(t, os.RemoveAll(at(e.Name())))
			}
		}},
	}
	for _, step := range steps {
		step.change()
		if !c.sync(t, src) {
			t.Errorf("%s: the change wasn't noticed", step.name)
		}
		sameTrees(t, describe(t, src), describe(t, c.dir))
		c.checkRecords(t)
		before := describe(t, c.dir)
		if c.sync(t, src, func(r *receiver) { r.open = func() (*place, error) { return nil, errors.New("opened") } }) {
			t.Errorf("%s: changed without a change", step.name)
		}
		sameTrees(t, before, describe(t, c.dir))
		if t.Failed() {
			t.Fatalf("after step %q", step.name)
		}
	}
}

func must1[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestReplaced shows that a changed file is a new one: who still has the old
// one open, or linked, keeps what it had.
func TestReplaced(t *testing.T) {
	src, c := t.TempDir(), newCopy(t)
	write(t, filepath.Join(src, "f"), "one", 0o644)
	c.sync(t, src)
	held := must1(os.Open(filepath.Join(c.dir, "f")))
	defer held.Close()
	write(t, filepath.Join(src, "f"), "twoo", 0o644)
	c.sync(t, src)
	if got := string(must1(io.ReadAll(held))); got != "one" {
		t.Errorf("the old file became %q", got)
	}
}

// compat: SES-037
func TestEverything(t *testing.T) {
	src, c := t.TempDir(), newCopy(t)
	write(t, filepath.Join(src, "f"), "one", 0o644)
	write(t, filepath.Join(src, "d/g"), "two", 0o644)
	c.sync(t, src)
	// What the copy has is wrong, and nothing shows it.
	st := must1(os.Stat(filepath.Join(c.dir, "f")))
	must(t, os.WriteFile(filepath.Join(c.dir, "f"), []byte("bad"), 0o644))
	must(t, os.Chtimes(filepath.Join(c.dir, "f"), st.ModTime(), st.ModTime()))
	if c.sync(t, src) {
		t.Error("the usual transfer looked at the copy")
	}
	if !c.sync(t, src, func(r *receiver) { r.everything = true }) {
		t.Error("nothing was transferred")
	}
	sameTrees(t, describe(t, src), describe(t, c.dir))
}

// compat: SES-040
func TestStartOver(t *testing.T) {
	needRoot(t)
	src, busy := t.TempDir(), newCopy(t)
	fill(t, src)
	busy.sync(t, src)
	before := describe(t, busy.dir)
	write(t, filepath.Join(src, "fifo2"), "late in the walk", 0o644)

	fresh := newCopy(t)
	r := busy.receiver(t)
	inner := fresh.receiver(t).open
	r.open = func() (*place, error) {
		p, err := inner()
		p.other = &oldState{}
		return p, err
	}
	must(t, transferFrom(t, r, src))
	sameTrees(t, describe(t, src), describe(t, fresh.dir))
	sameTrees(t, before, describe(t, busy.dir))
	fresh.checkRecords(t)
	fresh.state = r.state.encode()
	if fresh.sync(t, src) {
		t.Error("the state of the fresh copy is wrong")
	}
}

// TestRandom changes a tree at random and compares after each transfer.
func TestRandom(t *testing.T) {
	needRoot(t)
	for seed := range uint64(8) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 1))
			src, c := t.TempDir(), newCopy(t)
			for range 25 {
				for range 1 + rng.IntN(12) {
					mutate(t, rng, src)
				}
				c.sync(t, src)
				sameTrees(t, describe(t, src), describe(t, c.dir))
				c.checkRecords(t)
				if t.Failed() {
					t.FailNow()
				}
			}
		})
	}
}

// mutate does one random thing below dir.
func mutate(t testing.TB, rng *rand.Rand, dir string) {
	paths := slices.Sorted(maps.Keys(describe(t, dir)))
	names := []string{"a", "b", "a.b", "a-b", "c", "é", "z"}
	var dirs []string
	for _, p := range append(paths, ".") {
		if st, err := os.Lstat(filepath.Join(dir, p)); err == nil && st.IsDir() && strings.Count(p, "/") < 4 {
			dirs = append(dirs, p)
		}
	}
	p := filepath.Join(dir, dirs[rng.IntN(len(dirs))], names[rng.IntN(len(names))])
	switch rng.IntN(9) {
	case 0, 1, 2:
		if st, err := os.Lstat(p); err == nil && !st.Mode().IsRegular() {
			must(t, os.RemoveAll(p))
		}
		must(t, os.WriteFile(p, []byte(strings.Repeat("x", rng.IntN(100_000)*rng.IntN(2))), 0o600))
	case 3, 4:
		must(t, os.RemoveAll(p))
		must(t, os.Mkdir(p, 0o755))
	case 5:
		must(t, os.RemoveAll(p))
		must(t, os.Symlink(names[rng.IntN(len(names))], p))
	case 6:
		must(t, os.RemoveAll(p))
	case 7:
		if len(paths) == 0 {
			return
		}
		other := filepath.Join(dir, paths[rng.IntN(len(paths))])
		if st, err := os.Lstat(other); err == nil && st.Mode().IsRegular() && other != p {
			must(t, os.RemoveAll(p))
			if _, err := os.Lstat(other); err == nil {
				must(t, os.Link(other, p))
			}
		}
	case 8:
		if _, err := os.Lstat(p); err == nil {
			must(t, os.Lchown(p, rng.IntN(3), rng.IntN(3)))
		}
	}
}
