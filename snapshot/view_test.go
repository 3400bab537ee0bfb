package snapshot_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/kilnbuild/kiln/snapshot/snapshottest"
	"golang.org/x/sys/unix"
)

func bindMount(source string, options ...string) []mount.Mount {
	return []mount.Mount{{Type: "bind", Source: source, Options: append(options, "rbind")}}
}

func openView(t testing.TB, mounts []mount.Mount) *snapshot.View {
	t.Helper()
	v, err := snapshot.Open(mounts)
	must(t, err)
	return v
}

func TestViewOfNothing(t *testing.T) {
	onKernels(t, func(t *testing.T) {
		v := openView(t, nil)
		if got := names(t, v.Path()); len(got) != 0 {
			t.Errorf("it holds %v", got)
		}
		if err := os.Mkdir(v.Path()+"/x", 0o755); !errors.Is(err, unix.EROFS) {
			t.Errorf("mkdir: %v", err)
		}
		path := v.Path()
		must(t, v.Close())
		if _, err := os.ReadDir(path); err == nil {
			t.Error("it can be read after Close")
		}
	})
}

func TestViewOfOtherMounts(t *testing.T) {
	onKernels(t, func(t *testing.T) {
		v := openView(t, []mount.Mount{{Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "nodev", "noexec", "mode=0700", "size=64k"}}})
		defer v.Close()
		var st unix.Statfs_t
		must(t, unix.Fstatfs(v.FD(), &st))
		if st.Blocks*uint64(st.Bsize) != 64<<10 || st.Flags&unix.ST_NOSUID == 0 || st.Flags&unix.ST_NODEV == 0 || st.Flags&unix.ST_NOEXEC == 0 {
			t.Errorf("statfs %+v", st)
		}
		writeFile(t, v.Path()+"/sub/x", "secret")

		// What is inside it can be shown elsewhere, also by way of another view.
		sub := openView(t, bindMount(v.Path()+"/sub", "ro"))
		defer sub.Close()
		again := openView(t, bindMount(sub.Path(), "nosuid"))
		defer again.Close()
		file := openView(t, bindMount(again.Path()+"/x", "ro"))
		defer file.Close()
		if data, err := os.ReadFile(file.Path()); string(data) != "secret" {
			t.Errorf("file: %q, %v", data, err)
		}
		if err := os.WriteFile(sub.Path()+"/y", nil, 0o644); !errors.Is(err, unix.EROFS) {
			t.Errorf("write to a read-only bind: %v", err)
		}
	})
}

func TestViewErrors(t *testing.T) {
	onKernels(t, func(t *testing.T) {
		dir := t.TempDir()
		for name, mounts := range map[string][]mount.Mount{
			"open_tree: no such file":     bindMount(dir + "/none"),
			"unknown options":             bindMount(dir, "size=3"),
			"without a source":            bindMount(""),
			"2 mounts on top":             append(bindMount(dir), bindMount(dir)...),
			"only a whole view":           {{Type: "bind", Source: dir, Target: "x", Options: []string{"rbind"}}},
			"without a type":              {{Source: dir}},
			"fsopen no-such-fs":           {{Type: "no-such-fs"}},
			"no-such-option":              {{Type: "tmpfs", Options: []string{"no-such-option"}}},
			"overlay of 2 layers":         {{Type: "overlay", Options: []string{"lowerdir=" + dir + "/none:" + dir}}},
			"layers with upper " + dir:    {{Type: "overlay", Options: []string{"lowerdir=" + dir, "upperdir=" + dir + "/u", "workdir=" + dir + "/w"}}},
			"mode=nonsense":               {{Type: "tmpfs", Options: []string{"mode=nonsense"}}},
			"mount tmpfs: option size=x%": {{Type: "tmpfs", Options: []string{"size=x%"}}},
		} {
			v, err := snapshot.Open(mounts)
			if err == nil {
				must(t, v.Close())
			}
			if err == nil || !strings.Contains(err.Error(), name) {
				t.Errorf("want an error with %q, got %v", name, err)
			}
		}
	})
}

func TestViewResolve(t *testing.T) {
	snapshottest.Root(t)
	outer := t.TempDir()
	dir := outer + "/root"
	writeFile(t, outer+"/secret", "outside")
	writeFile(t, dir+"/d/file", "inside")
	for name, target := range map[string]string{"abs": "/d", "up": "../../../d", "esc": "/secret", "dots": "../secret", "magic": "/proc/self/root"} {
		must(t, os.Symlink(target, dir+"/"+name))
	}
	v := openView(t, bindMount(dir))
	defer v.Close()
	for _, name := range []string{"d/file", "/d/file", "abs/file", "up/file", "../../d/file"} {
		f, err := v.OpenFile(name, os.O_RDONLY, 0)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		buf := make([]byte, 10)
		if n, _ := f.Read(buf); string(buf[:n]) != "inside" {
			t.Errorf("%s reads %q", name, buf[:n])
		}
		must(t, f.Close())
	}
	for _, name := range []string{"esc", "dots", "../secret", "magic/etc/passwd", "none"} {
		if f, err := v.Resolve(name); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v, %v", name, f, err)
		}
	}
	f, err := v.OpenFile("abs/new", os.O_CREATE|os.O_WRONLY, 0o640)
	must(t, err)
	must(t, f.Close())
	if st, err := os.Stat(dir + "/d/new"); err != nil || st.Mode() != 0o640 {
		t.Errorf("created %v, %v", st, err)
	}
	r, err := v.Resolve("abs/../d")
	must(t, err)
	must(t, r.Close())
}

func TestAttachDetach(t *testing.T) {
	onKernels(t, func(t *testing.T) {
		o := newOverlay(t)
		makeLayer(t, o, "a", "", func(dir string) { writeFile(t, dir+"/x", "a") })
		must(t, o.Prepare(t.Context(), "b", "a"))
		mounts, err := o.Mounts(t.Context(), "b", false)
		must(t, err)
		target := t.TempDir()
		must(t, snapshot.Detach(target)) // nothing there is fine
		must(t, snapshot.Detach(target+"/none"))
		must(t, snapshot.Attach(mounts, target))
		must(t, snapshot.Attach(bindMount(layerDir(o, "a"), "ro"), target)) // on top
		if err := os.WriteFile(target+"/y", nil, 0o644); !errors.Is(err, unix.EROFS) {
			t.Errorf("write: %v", err)
		}
		must(t, unix.Unmount(target, unix.MNT_DETACH))
		writeFile(t, target+"/y", "b")
		busy, err := os.Open(target) // doesn't stop a lazy unmount
		must(t, err)
		must(t, snapshot.Detach(target))
		must(t, busy.Close())
		if got := names(t, target); got != nil {
			t.Errorf("still mounted: %v", got)
		}
		if _, err := os.Stat(layerDir(o, "b") + "/y"); err != nil {
			t.Error(err)
		}
		if err := snapshot.Attach(mounts, target+"/none"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("attach at nothing: %v", err)
		}
	})
}

// A container takes the mount into its own namespace; a second view of the same
// snapshot must still be possible.
func TestViewMovedAway(t *testing.T) {
	onKernels(t, func(t *testing.T) {
		o := newOverlay(t)
		makeLayer(t, o, "a", "", func(dir string) { writeFile(t, dir+"/x", "a") })
		must(t, o.Prepare(t.Context(), "b", "a"))
		mounts, err := o.Mounts(t.Context(), "b", false)
		must(t, err)
		v := openView(t, mounts)
		target := t.TempDir()
		must(t, unix.MoveMount(v.FD(), "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH))
		writeFile(t, target+"/moved", "")
		inSnapshot(t, o, "b", func(dir string) {
			if got := snapshottest.Listing(t, dir); got != "moved= x=a" {
				t.Errorf("a second view shows %q", got)
			}
			writeFile(t, dir+"/second", "")
		})
		if got := snapshottest.Listing(t, target); got != "moved= second= x=a" {
			t.Errorf("the first shows %q", got)
		}
		must(t, snapshot.Detach(target))
		must(t, v.Close())
	})
}

func TestViewsOfOneSnapshotAtOnce(t *testing.T) {
	onKernels(t, func(t *testing.T) {
		o := newOverlay(t)
		makeLayer(t, o, "a", "", func(dir string) { writeFile(t, dir+"/x", "a") })
		must(t, o.Prepare(t.Context(), "b", "a"))
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				for j := range 10 {
					inSnapshot(t, o, "b", func(dir string) {
						if err := os.WriteFile(fmt.Sprintf("%s/%d-%d", dir, i, j), nil, 0o644); err != nil {
							t.Error(err)
						}
					})
				}
			})
		}
		wg.Wait()
		inSnapshot(t, o, "b", func(dir string) {
			if n := len(names(t, dir)); n != 81 {
				t.Errorf("%d files, want 81", n)
			}
		})
	})
}

func TestViewsLeaveNoMounts(t *testing.T) {
	onKernels(t, func(t *testing.T) {
		fds := len(names(t, "/proc/self/fd"))
		o := newOverlay(t)
		makeLayer(t, o, "a", "", func(dir string) { writeFile(t, dir+"/x", "a") })
		makeLayer(t, o, "b", "a", func(dir string) {})
		inSnapshot(t, o, "b", func(dir string) {})
		// Others on the machine mount, too.
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		must(t, err)
		root := strings.TrimSuffix(layerDir(o, "b"), "/snapshots/b/fs")
		if strings.Contains(string(mounts), root) {
			t.Errorf("mounts under %s are left:\n%s", root, mounts)
		}
		if n := len(names(t, "/proc/self/fd")); n > fds+6 { // the store's
			t.Errorf("%d open files, %d before", n, fds)
		}
	})
}

func BenchmarkOpen(b *testing.B) {
	snapshottest.Root(b)
	for _, k := range kernels() {
		for _, layers := range []int{1, 10, 120} {
			b.Run(fmt.Sprintf("%s/%d", k.name, layers), func(b *testing.B) {
				snapshot.WithKernel(b, k.layers, k.clones)
				o := newOverlay(b)
				parent := ""
				for i := range layers {
					id := fmt.Sprint("s", i)
					must(b, o.Prepare(b.Context(), id, parent))
					writeFile(b, filepath.Join(layerDir(o, id), id), "")
					must(b, o.Commit(b.Context(), id))
					parent = id
				}
				must(b, o.Prepare(b.Context(), "top", parent))
				mounts, err := o.Mounts(b.Context(), "top", false)
				must(b, err)
				for b.Loop() {
					v, err := snapshot.Open(mounts)
					if err != nil {
						b.Fatal(err)
					}
					if err := v.Close(); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

func BenchmarkPrepareCommitRemove(b *testing.B) {
	o := newOverlay(b)
	makeLayer(b, o, "base", "", func(dir string) {})
	i := 0
	for b.Loop() {
		i++
		id := fmt.Sprint("s", i)
		must(b, o.Prepare(b.Context(), id, "base"))
		must(b, o.Commit(b.Context(), id))
	}
}
