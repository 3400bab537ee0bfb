package snapshot_test

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/kilnbuild/kiln/snapshot"
	"golang.org/x/sys/unix"
)

// place returns where id gets path, "" if that takes a mount, and makes a directory
// there called name, unless that is "".
func place(t *testing.T, o *snapshot.Overlay, id, path, name string) string {
	t.Helper()
	p, err := o.Place(t.Context(), id, path)
	must(t, err)
	if p == nil {
		return ""
	}
	if name != "" {
		must(t, unix.Mkdirat(p.FD(), name, 0o755))
	}
	must(t, p.Close())
	return p.Path()
}

// placeBase makes the snapshot "top" of two layers.
func placeBase(t *testing.T, o *snapshot.Overlay) {
	t.Helper()
	makeLayer(t, o, "base", "", func(dir string) {
		writeFile(t, dir+"/a/b/file", "")
		writeFile(t, dir+"/a/hidden/file", "")
		writeFile(t, dir+"/gone/file", "")
		must(t, os.Symlink("a", dir+"/link"))
		must(t, os.Chown(dir+"/a/b", 1, 2))
		must(t, unix.Chmod(dir+"/a/b", 0o2711))
	})
	makeLayer(t, o, "top", "base", func(dir string) {
		must(t, os.RemoveAll(dir+"/gone"))
		must(t, os.RemoveAll(dir+"/a/hidden"))
		must(t, os.Mkdir(dir+"/a/hidden", 0o700))
		writeFile(t, dir+"/c", "")
	})
}

func TestPlace(t *testing.T) {
	onKernels(t, func(t *testing.T) {
		o := newOverlay(t)
		placeBase(t, o)
		for i, c := range []struct{ path, want string }{
			{"/new", "/"},
			{"new/", "/"},
			{"/new/below/it", "/"},
			{"/gone", "/"},
			{"/a/b/new", "/a/b"},
			{"/a//b/./new", "/a/b"},
			{"/a/hidden/file", "/a/hidden"},
			{"/", ""},
			{"/c", ""},
			{"/c/new", ""},
			{"/a", ""},
			{"/a/b/file", ""},
			{"/a/hidden", ""},
			{"/link", ""},
			{"/link/new", ""},
			{"/new/../a", ""},
		} {
			t.Run(c.path, func(t *testing.T) {
				id := fmt.Sprintf("it%d", i)
				prepareOn(t, o, id, "top")
				if got := place(t, o, id, c.path, ""); got != c.want {
					t.Errorf("the place is %q, want %q", got, c.want)
				}
			})
		}
	})
}

// What is made in places is seen through a mount, and directories on the way there
// are as they were.
func TestPlaceMake(t *testing.T) {
	onKernels(t, func(t *testing.T) {
		o := newOverlay(t)
		placeBase(t, o)
		prepareOn(t, o, "it", "top")
		for _, c := range []struct{ path, name, want string }{
			{"/a/b/x/y", "x", "/a/b"},
			{"/a/b/x/y", "y", "/a/b/x"},
			{"/a/b/x/y", "", ""},
			{"/gone/file", "gone", "/"},
			{"/gone/file", "", "/gone"},
		} {
			if got := place(t, o, "it", c.path, c.name); got != c.want {
				t.Errorf("the place of %s is %q, want %q", c.path, got, c.want)
			}
		}
		inSnapshot(t, o, "it", func(dir string) {
			for _, path := range []string{"/a/b/x/y", "/a/b/file", "/gone", "/c"} {
				_, err := os.Lstat(dir + path)
				must(t, err)
			}
			if _, err := os.Lstat(dir + "/gone/file"); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("what was below a deleted directory: %v", err)
			}
			var st unix.Stat_t
			must(t, unix.Stat(dir+"/a/b", &st))
			if st.Mode != unix.S_IFDIR|0o2711 || st.Uid != 1 || st.Gid != 2 {
				t.Errorf("the directory became %o of %d:%d", st.Mode, st.Uid, st.Gid)
			}
			must(t, os.RemoveAll(dir+"/a/b"))
		})
		// The layer has a whiteout there.
		if got := place(t, o, "it", "/a/b", ""); got != "" {
			t.Errorf("what was deleted in the snapshot itself has the place %q", got)
		}
	})
}

// A snapshot on nothing is one place.
func TestPlaceAlone(t *testing.T) {
	o := newOverlay(t)
	prepareOn(t, o, "it", "")
	for _, path := range []string{"/", "/x/y", "/.."} {
		if got := place(t, o, "it", path, ""); got != "/" {
			t.Errorf("the place of %s is %q", path, got)
		}
	}
	must(t, o.Commit(t.Context(), "it"))
	if _, err := o.Place(t.Context(), "it", "/"); !errors.Is(err, snapshot.ErrNotActive) {
		t.Errorf("a place in a committed snapshot: %v", err)
	}
	if _, err := o.Place(t.Context(), "other", "/"); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("a place in no snapshot: %v", err)
	}
}

// Directories of which only the kernel knows what they show are left to it.
func TestPlaceOdd(t *testing.T) {
	acl := "\x02\x00\x00\x00\x01\x00\x07\x00\xff\xff\xff\xff\x04\x00\x07\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff"
	for _, c := range []struct{ dir, xattr, value string }{
		{"/a", "trusted.overlay.redirect", "/elsewhere"},
		{"/a", "trusted.overlay.opaque", "x"},
		{"/a", "system.posix_acl_default", acl},
		{"", "system.posix_acl_default", acl},
	} {
		t.Run(c.dir+" "+c.xattr, func(t *testing.T) {
			o := newOverlay(t)
			placeBase(t, o)
			prepareOn(t, o, "odd", "")
			inSnapshot(t, o, "odd", func(dir string) {
				must(t, os.Mkdir(dir+"/a", 0o755))
				must(t, unix.Setxattr(dir+c.dir, c.xattr, []byte(c.value), 0))
			})
			must(t, o.Commit(t.Context(), "odd"))
			prepareOn(t, o, "it", "odd")
			if got := place(t, o, "it", "/a/new", ""); got != "" {
				t.Errorf("the place is %q", got)
			}
		})
	}
}

func TestPlaceLostLayer(t *testing.T) {
	o := newOverlay(t)
	placeBase(t, o)
	prepareOn(t, o, "it", "top")
	must(t, os.RemoveAll(snapshot.LayerDir(o, "base")))
	if _, err := o.Place(t.Context(), "it", "/new"); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("a place on a lost layer: %v", err)
	}
	must(t, os.RemoveAll(snapshot.LayerDir(o, "it")))
	if _, err := o.Place(t.Context(), "it", "/new"); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("a place in a lost snapshot: %v", err)
	}
}
