package snapshot_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/continuity/fs"
	"github.com/kilnbuild/kiln/snapshot"
	"golang.org/x/sys/unix"
)

func diffOf(t testing.TB, s snapshot.Snapshotter, id string) []byte {
	t.Helper()
	var buf bytes.Buffer
	must(t, snapshot.WriteDiff(t.Context(), s, id, &buf))
	return buf.Bytes()
}

// entries lists a tar: name, type, and what else is worth seeing.
func entries(t testing.TB, data []byte) string {
	t.Helper()
	var out []string
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return strings.Join(out, " ")
		}
		must(t, err)
		e := h.Name
		if h.Linkname != "" {
			e += fmt.Sprintf("(%c%s)", h.Typeflag, h.Linkname)
		}
		out = append(out, e)
	}
}

// headers describes the entries of a tar in full, but for the root, which
// containerd's differ writes when it is given a path that is a link.
func headers(t testing.TB, data []byte) []string {
	t.Helper()
	var out []string
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return out
		}
		must(t, err)
		if h.Name == "./" {
			continue
		}
		sum := sha256.New()
		_, err = io.Copy(sum, r)
		must(t, err)
		out = append(out, fmt.Sprintf("%q %c %q %o %d:%d %d:%d %d %v %q %x", h.Name, h.Typeflag, h.Linkname, h.Mode, h.Uid, h.Gid,
			h.Devmajor, h.Devminor, h.Size, h.ModTime.UTC(), h.PAXRecords, sum.Sum(nil)))
	}
}

// upstreamDiff is what containerd's differ writes for the same change.
func upstreamDiff(t *testing.T, s snapshot.Snapshotter, id string) []byte {
	t.Helper()
	info, err := s.Stat(t.Context(), id)
	must(t, err)
	lower := openView(t, nil)
	if info.Parent != "" {
		must(t, lower.Close())
		mounts, err := s.Mounts(t.Context(), info.Parent, true)
		must(t, err)
		lower = openView(t, mounts)
	}
	defer lower.Close()
	mounts, err := s.Mounts(t.Context(), id, true)
	must(t, err)
	upper := openView(t, mounts)
	defer upper.Close()
	var buf bytes.Buffer
	cw := archive.NewChangeWriter(&buf, upper.Path())
	must(t, fs.Changes(t.Context(), lower.Path()+"/.", upper.Path()+"/.", cw.HandleChange))
	must(t, cw.Close())
	return buf.Bytes()
}

func TestWriteDiff(t *testing.T) {
	for _, c := range []struct {
		name         string
		base, change func(t *testing.T, dir string)
		want         string
		// other says that containerd writes something else, on purpose.
		other bool
	}{
		{
			name:   "new files",
			change: func(t *testing.T, dir string) { writeFile(t, dir+"/b/y", "1"); writeFile(t, dir+"/a", "2") },
			want:   "a b/ b/y",
		},
		{
			name:   "sorted by directory",
			change: func(t *testing.T, dir string) { writeFile(t, dir+"/a/b/c", "1"); writeFile(t, dir+"/a-b", "2") },
			want:   "a/ a/b/ a/b/c a-b",
		},
		{
			name:   "only what changed and the directories to it",
			base:   func(t *testing.T, dir string) { writeFile(t, dir+"/a/b/old", "1"); writeFile(t, dir+"/c/x", "2") },
			change: func(t *testing.T, dir string) { writeFile(t, dir+"/a/b/new", "1") },
			want:   "a/ a/b/ a/b/new",
		},
		{
			name: "deletions",
			base: func(t *testing.T, dir string) {
				writeFile(t, dir+"/a/x", "1")
				writeFile(t, dir+"/d/y", "2")
				writeFile(t, dir+"/f", "")
			},
			change: func(t *testing.T, dir string) {
				must(t, os.RemoveAll(dir+"/d"))
				must(t, os.Remove(dir+"/a/x"))
				must(t, os.Remove(dir+"/f"))
			},
			want: "a/ a/.wh.x .wh.d .wh.f",
		},
		{
			name: "a file that was there shortly",
			base: func(t *testing.T, dir string) { writeFile(t, dir+"/a/x", "1") },
			change: func(t *testing.T, dir string) {
				writeFile(t, dir+"/a/y", "1")
				must(t, os.Remove(dir+"/a/y"))
			},
			want: "",
		},
		{
			name: "a directory in the place of a directory",
			base: func(t *testing.T, dir string) { writeFile(t, dir+"/a/x", "1"); writeFile(t, dir+"/a/y", "1") },
			change: func(t *testing.T, dir string) {
				must(t, os.RemoveAll(dir+"/a"))
				writeFile(t, dir+"/a/y", "2")
			},
			want: "a/ a/.wh.x a/y",
		},
		{
			name: "a directory in the place of a file and back",
			base: func(t *testing.T, dir string) { writeFile(t, dir+"/a/x", "1"); writeFile(t, dir+"/b", "1") },
			change: func(t *testing.T, dir string) {
				must(t, os.RemoveAll(dir+"/a"))
				must(t, os.Remove(dir+"/b"))
				writeFile(t, dir+"/a", "2")
				writeFile(t, dir+"/b/x", "2")
			},
			want: "a b/ b/x",
		},
		{
			name: "metadata of a directory",
			base: func(t *testing.T, dir string) { writeFile(t, dir+"/a/x", "1") },
			change: func(t *testing.T, dir string) {
				must(t, os.Chmod(dir+"/a", 0o700))
			},
			want: "a/",
		},
		{
			name: "files that were touched but not changed",
			base: func(t *testing.T, dir string) {
				writeFile(t, dir+"/d/x", "1")
				writeFile(t, dir+"/d/y", "1")
				must(t, os.Symlink("1", dir+"/d/l"))
				for _, f := range []string{"/d/y", "/d/l"} {
					must(t, unix.UtimesNanoAt(unix.AT_FDCWD, dir+f, []unix.Timespec{{Sec: 5}, {Sec: 5}}, unix.AT_SYMLINK_NOFOLLOW))
				}
			},
			change: func(t *testing.T, dir string) {
				for _, f := range []string{"/d/x", "/d/y"} {
					must(t, os.Chmod(dir+f, 0o600))
					must(t, os.Chmod(dir+f, 0o644))
				}
				must(t, os.Remove(dir+"/d/l"))
				must(t, os.Symlink("1", dir+"/d/l"))
				must(t, unix.UtimesNanoAt(unix.AT_FDCWD, dir+"/d/l", []unix.Timespec{{Sec: 5}, {Sec: 5}}, unix.AT_SYMLINK_NOFOLLOW))
			},
			want: "",
		},
		{
			name: "other content of the same size and time",
			base: func(t *testing.T, dir string) {
				writeFile(t, dir+"/x", "1")
				must(t, os.Chtimes(dir+"/x", time.Unix(5, 0), time.Unix(5, 0)))
			},
			change: func(t *testing.T, dir string) {
				writeFile(t, dir+"/x", "2")
				must(t, os.Chtimes(dir+"/x", time.Unix(5, 0), time.Unix(5, 0)))
			},
			want: "x",
		},
		{ // as within a tick of the clock of kernels before 6.13
			name: "other content of the same size and exact time",
			base: func(t *testing.T, dir string) {
				writeFile(t, dir+"/x", "1")
				must(t, os.Chtimes(dir+"/x", time.Unix(5, 7), time.Unix(5, 7)))
			},
			change: func(t *testing.T, dir string) {
				writeFile(t, dir+"/x", "2")
				must(t, os.Chtimes(dir+"/x", time.Unix(5, 7), time.Unix(5, 7)))
			},
			want:  "x",
			other: true,
		},
		{
			name: "hard links",
			change: func(t *testing.T, dir string) {
				writeFile(t, dir+"/a", "1")
				must(t, os.Mkdir(dir+"/d", 0o755))
				must(t, os.Link(dir+"/a", dir+"/d/b"))
				must(t, os.Symlink("a", dir+"/s"))
				must(t, os.Link(dir+"/s", dir+"/s2"))
			},
			want: "a d/ d/b(1a) s(2a) s2(1s)",
		},
		{
			name: "a link to a file of the parent",
			base: func(t *testing.T, dir string) { writeFile(t, dir+"/a", "1") },
			change: func(t *testing.T, dir string) {
				must(t, os.Link(dir+"/a", dir+"/b"))
			},
			want:  "a b(1a)",
			other: true, // writes the new name first
		},
		{
			name: "all kinds of files",
			change: func(t *testing.T, dir string) {
				must(t, unix.Mknod(dir+"/c", unix.S_IFCHR|0o640, int(unix.Mkdev(1, 3))))
				must(t, unix.Mknod(dir+"/b", unix.S_IFBLK|0o600, int(unix.Mkdev(259, 70000))))
				must(t, unix.Mkfifo(dir+"/p", 0o644))
				must(t, os.Symlink("/x", dir+"/l"))
				writeFile(t, dir+"/s", "")
				must(t, os.Chmod(dir+"/s", 0o755|os.ModeSetuid|os.ModeSetgid|os.ModeSticky))
				must(t, os.Chown(dir+"/p", 3000000, 5))
				l, err := net.Listen("unix", dir+"/sock")
				must(t, err)
				l.(*net.UnixListener).SetUnlinkOnClose(false)
				must(t, l.Close())
			},
			want: "b c l(2/x) p s",
		},
		{
			name: "names",
			change: func(t *testing.T, dir string) {
				for _, n := range []string{"ä", "a b", strings.Repeat("n", 200), "new\nline", "\xff\xfe"} {
					writeFile(t, dir+"/"+n+"/"+n, n)
				}
			},
			want: "a b/ a b/a b new\nline/ new\nline/new\nline " + strings.Repeat("n", 200) + "/ " +
				strings.Repeat("n", 200) + "/" + strings.Repeat("n", 200) + " ä/ ä/ä \xff\xfe/ \xff\xfe/\xff\xfe",
		},
		{
			name: "file capabilities",
			base: func(t *testing.T, dir string) { writeFile(t, dir+"/d/x", "1"); writeFile(t, dir+"/d/y", "1") },
			change: func(t *testing.T, dir string) {
				must(t, unix.Setxattr(dir+"/d/x", "security.capability", []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
			},
			want: "d/ d/x",
		},
		{
			name: "what users attach",
			base: func(t *testing.T, dir string) { writeFile(t, dir+"/x", "1"); writeFile(t, dir+"/d/y", "1") },
			change: func(t *testing.T, dir string) {
				must(t, unix.Setxattr(dir+"/x", "user.note", []byte("\x00 \n"), 0))
				must(t, unix.Setxattr(dir+"/d", "user.note", nil, 0))
				must(t, unix.Setxattr(dir+"/d/y", "trusted.note", nil, 0))
			},
			want: "",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := newOverlay(t)
			parent := ""
			if c.base != nil {
				parent = "base"
				makeLayer(t, o, parent, "", func(dir string) { c.base(t, dir) })
			}
			makeLayer(t, o, "top", parent, func(dir string) { c.change(t, dir) })
			got := diffOf(t, o, "top")
			if e := entries(t, got); e != c.want {
				t.Errorf("wrote %q, want %q", e, c.want)
			}
			if !bytes.Equal(got, diffOf(t, o, "top")) {
				t.Error("a second time it wrote something else")
			}
			if us, up := headers(t, got), headers(t, upstreamDiff(t, o, "top")); slices.Equal(us, up) == c.other {
				t.Errorf("wrote\n%s\ncontainerd writes\n%s", strings.Join(us, "\n"), strings.Join(up, "\n"))
			}
			applyElsewhere(t, o, parent, "top", got)
		})
	}
}

// applyElsewhere checks that the layer, unpacked again, shows the same.
func applyElsewhere(t *testing.T, o *snapshot.Overlay, parent, id string, layer []byte) {
	t.Helper()
	must(t, o.Prepare(t.Context(), "copy-of-"+id, parent))
	must(t, snapshot.Apply(t.Context(), o, "copy-of-"+id, bytes.NewReader(layer)))
	want, got := treeOf(t, o, id), treeOf(t, o, "copy-of-"+id)
	sameTree(t, "what the layer unpacks to", got, want)
	if again := diffOf(t, o, "copy-of-"+id); !bytes.Equal(again, layer) {
		t.Errorf("written again: %q, was %q", entries(t, again), entries(t, layer))
	}
}

// note is what users and hosts attach to files.
var note = regexp.MustCompile(` (user|trusted)\.note="[^"]*"`)

// treeOf describes what is visible in a snapshot, without what isn't in layers.
func treeOf(t *testing.T, s snapshot.Snapshotter, id string) []string {
	t.Helper()
	var out []string
	inSnapshot(t, s, id, func(dir string) {
		for _, line := range tree(t, dir, false) {
			name, _, _ := strings.Cut(line, " ")
			if !strings.Contains(line, " 140") || name == "/" { // sockets
				out = append(out, note.ReplaceAllString(line, ""))
			}
		}
	})
	return out
}

func TestWriteDiffErrors(t *testing.T) {
	o := newOverlay(t)
	makeLayer(t, o, "a", "", func(dir string) { writeFile(t, dir+"/x", strings.Repeat("x", 1<<20)) })
	stack(t, o, "st", "a")
	if err := snapshot.WriteDiff(t.Context(), o, "none", io.Discard); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("no snapshot: %v", err)
	}
	if err := snapshot.WriteDiff(t.Context(), o, "st", io.Discard); err == nil || !strings.Contains(err.Error(), "no layer of its own") {
		t.Errorf("a stack: %v", err)
	}
	full := errors.New("full")
	if err := snapshot.WriteDiff(t.Context(), o, "a", writerFunc(func([]byte) (int, error) { return 0, full })); !errors.Is(err, full) {
		t.Errorf("a writer that fails: %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(full)
	if err := snapshot.WriteDiff(ctx, o, "a", io.Discard); !errors.Is(err, full) {
		t.Errorf("cancelled: %v", err)
	}
	makeLayer(t, o, "r", "", func(dir string) {
		must(t, unix.Setxattr(mkdir(t, dir+"/r"), "trusted.overlay.redirect", []byte("/q"), 0))
	})
	if err := snapshot.WriteDiff(t.Context(), o, "r", io.Discard); err == nil || !strings.Contains(err.Error(), "redirect") {
		t.Errorf("a redirect: %v", err)
	}
	must(t, os.RemoveAll(layerDir(o, "a")))
	if err := snapshot.WriteDiff(t.Context(), o, "a", io.Discard); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("files gone: %v", err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func mkdir(t testing.TB, path string) string {
	t.Helper()
	must(t, os.MkdirAll(path, 0o755))
	return path
}

// Deletions in the form that needs no devices.
func TestWriteDiffXattrWhiteouts(t *testing.T) {
	o := newOverlay(t)
	makeLayer(t, o, "a", "", func(dir string) {
		writeFile(t, dir+"/d/x", "1")
		writeFile(t, dir+"/d/y", "1")
		writeFile(t, dir+"/r", "1")
	})
	makeLayer(t, o, "b", "a", func(dir string) {})
	dir := layerDir(o, "b")
	must(t, o.Reopen(t.Context(), "b"))
	for _, f := range []string{"/d/x", "/d/new", "/r"} {
		writeFile(t, dir+f, "")
		must(t, unix.Setxattr(dir+f, "trusted.overlay.whiteout", nil, 0))
	}
	must(t, unix.Setxattr(dir, "trusted.overlay.opaque", []byte("x"), 0))
	must(t, unix.Setxattr(dir+"/d", "trusted.overlay.opaque", []byte("x"), 0))
	must(t, o.Commit(t.Context(), "b"))
	if got := entries(t, diffOf(t, o, "b")); got != "d/ d/.wh.x .wh.r" {
		t.Errorf("wrote %q", got)
	}
}

// mounted hides that the layers of an overlay are directories.
type mounted struct{ snapshot.Snapshotter }

func TestLayersOfOtherSnapshotters(t *testing.T) {
	o := newOverlay(t)
	s := mounted{o}
	makeLayer(t, s, "a", "", func(dir string) { writeFile(t, dir+"/d/x", "1"); writeFile(t, dir+"/y", "1") })
	makeLayer(t, s, "b", "a", func(dir string) { must(t, os.RemoveAll(dir+"/d")); writeFile(t, dir+"/z", "2") })
	for id, parent := range map[string]string{"a": "", "b": "a"} {
		layer := diffOf(t, s, id)
		if got, want := headers(t, layer), headers(t, diffOf(t, o, id)); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", id, got, want)
		}
		must(t, s.Prepare(t.Context(), id+"2", parent))
		must(t, snapshot.Apply(t.Context(), s, id+"2", bytes.NewReader(layer)))
		sameTree(t, id, treeOf(t, o, id+"2"), treeOf(t, o, id))
	}
	if err := snapshot.Apply(t.Context(), s, "a", bytes.NewReader(nil)); !errors.Is(err, snapshot.ErrNotActive) {
		t.Errorf("into a committed one: %v", err)
	}
}

// TestRoundTrip changes random trees at random, and unpacks the layers that this
// makes elsewhere.
func TestRoundTrip(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint("seed", seed), func(t *testing.T) {
			o := newOverlay(t)
			c := &changer{T: t, Rand: rand.New(rand.NewPCG(seed, 7))}
			parent, copyParent := "", ""
			for i := range 6 {
				id := fmt.Sprint("l", i)
				makeLayer(t, o, id, parent, func(dir string) { c.change(dir, 60) })
				layer := diffOf(t, o, id)
				applyElsewhere(t, o, parent, id, layer)
				// And the same on a parent that was itself unpacked.
				must(t, o.Prepare(t.Context(), "x"+id, copyParent))
				must(t, snapshot.Apply(t.Context(), o, "x"+id, bytes.NewReader(layer)))
				must(t, o.Commit(t.Context(), "x"+id))
				sameTree(t, "a chain of unpacked layers", treeOf(t, o, "x"+id), treeOf(t, o, id))
				if errs := o.Check(t.Context(), true); len(errs) > 0 {
					t.Fatal(errs)
				}
				parent, copyParent = id, "x"+id
			}
		})
	}
}

// changer makes random changes in a directory.
type changer struct {
	*testing.T
	*rand.Rand
	paths []string
}

func (c *changer) change(dir string, n int) {
	for range n {
		c.paths = []string{""}
		must(c, filepath.Walk(dir+"/", func(path string, info os.FileInfo, err error) error {
			if err == nil && path != dir+"/" {
				c.paths = append(c.paths, strings.TrimPrefix(path, dir))
			}
			return err
		}))
		c.one(dir)
	}
}

// pick returns something that exists.
func (c *changer) pick(dir string) (string, os.FileInfo) {
	p := dir + c.paths[c.IntN(len(c.paths))]
	if p == dir {
		p = dir + "/."
	}
	st, err := os.Lstat(p)
	must(c, err)
	return p, st
}

func (c *changer) one(dir string) {
	in, st := c.pick(dir)
	if !st.IsDir() {
		in = filepath.Dir(in)
	}
	name := in + "/" + string(rune('a'+c.IntN(8)))
	victim, vst := c.pick(dir)
	root := strings.HasSuffix(victim, "/.")
	fresh := func() bool { _, err := os.Lstat(name); return os.IsNotExist(err) }
	switch k := c.IntN(18); {
	case k < 4 && fresh():
		writeFile(c, name, strings.Repeat(fmt.Sprint(c.IntN(1000)), c.IntN(3000)))
		must(c, os.Chmod(name, []os.FileMode{0o644, 0o755 | os.ModeSetuid, 0o600, 0}[c.IntN(4)]))
	case k < 7 && fresh():
		must(c, os.Mkdir(name, 0o755))
	case k == 7 && fresh():
		must(c, os.Symlink([]string{"a", "../b", "/c/d", "nowhere"}[c.IntN(4)], name))
	case k == 8 && fresh():
		must(c, unix.Mknod(name, unix.S_IFIFO|0o644, 0))
	case k == 9 && fresh() && !vst.IsDir():
		must(c, os.Link(victim, name))
	case k == 10 && fresh() && !root && !strings.HasPrefix(filepath.Clean(name), filepath.Clean(victim)+"/"):
		err := os.Rename(victim, name)
		if err != nil && !errors.Is(err, unix.EXDEV) && !errors.Is(err, unix.ENOTDIR) && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENOENT) {
			c.Fatal(err)
		}
	case k == 11 && !root:
		must(c, os.RemoveAll(victim))
	case k == 12 && vst.IsDir() && !root: // emptied and made again
		must(c, os.RemoveAll(victim))
		must(c, os.Mkdir(victim, 0o750))
		writeFile(c, victim+"/a", "again")
	case k == 13 && !root:
		must(c, os.Lchown(victim, c.IntN(3), 70000))
	case k == 14 && vst.Mode().IsRegular():
		// A file capability of revision 2, as setcap writes it.
		must(c, unix.Setxattr(victim, "security.capability", append([]byte{1, 0, 0, 2, byte(c.IntN(5)) << 4}, make([]byte, 15)...), 0))
	case k == 15 && !root: // touched, but not changed
		must(c, os.Lchown(victim, int(vst.Sys().(*syscall.Stat_t).Uid), int(vst.Sys().(*syscall.Stat_t).Gid)))
	case k == 16 && vst.IsDir():
		writeFile(c, victim+"/shortly", "")
		must(c, os.Remove(victim+"/shortly"))
	case vst.Mode().IsRegular():
		f, err := os.OpenFile(victim, os.O_WRONLY|os.O_APPEND, 0)
		must(c, err)
		_, err = f.WriteString(fmt.Sprint(c.IntN(10)))
		must(c, errors.Join(err, f.Close()))
	}
}

func BenchmarkWriteDiff(b *testing.B) {
	o := newOverlay(b)
	makeLayer(b, o, "base", "", func(dir string) {})
	makeLayer(b, o, "a", "base", func(dir string) { manyFiles(b, dir) })
	b.ReportAllocs()
	for b.Loop() {
		must(b, snapshot.WriteDiff(b.Context(), o, "a", io.Discard))
	}
}

func manyFiles(b *testing.B, dir string) {
	data := strings.Repeat("x", 5000)
	for d := range 50 {
		for f := range 100 {
			writeFile(b, fmt.Sprintf("%s/d%02d/f%02d", dir, d, f), data)
		}
	}
}
