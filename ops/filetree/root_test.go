package filetree

import (
	"errors"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// rootOf opens a directory as the root of a tree.
func rootOf(t testing.TB, dir string) Root {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return At(fd)
}

// FuzzResolve holds resolve to what the kernel says of the same path after
// a chroot, where that exists.
func FuzzResolve(f *testing.F) {
	for _, p := range []string{"/abs/f", "/out/conf", "rel/../rel/f", "/../../dir", "//dir//f/", "dangling", "loop", "/toconf"} {
		f.Add(p)
	}
	dir := baseTree.Make(f)
	f.Fuzz(func(t *testing.T, p string) {
		if strings.ContainsRune(p, 0) || len(p) > 1000 {
			t.Skip("no path of a system call")
		}
		r := rootOf(t, dir)
		got, err := r.resolve(p, true)
		if err != nil {
			return
		}
		if !strings.HasPrefix(got, "/") || filepath.Clean(got) != got {
			t.Fatalf("%q resolves to %q", p, got)
		}
		fd, err := unix.Openat2(r.fd, strings.TrimLeft("./"+p, "/"), &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
		if err != nil {
			return
		}
		defer unix.Close(fd)
		var want unix.Stat_t
		if err := unix.Fstat(fd, &want); err != nil {
			t.Fatal(err)
		}
		st, err := r.lstat(got)
		if err != nil && !errors.Is(err, fs.ErrNotExist) || st.Ino != want.Ino || st.Dev != want.Dev {
			t.Fatalf("%q resolves to %q, %v, which isn't where the kernel goes", p, got, err)
		}
	})
}
