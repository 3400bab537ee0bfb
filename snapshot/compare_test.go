package snapshot_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/snapshot"
	"golang.org/x/sys/unix"
)

// compare returns what Compare finds, a line a difference.
func compare(t *testing.T, a, b string) []string {
	t.Helper()
	av, bv := openView(t, bindMount(a, "ro")), openView(t, bindMount(b, "ro"))
	defer av.Close()
	defer bv.Close()
	var out []string
	must(t, snapshot.Compare(context.Background(), av, bv, func(d snapshot.Difference) { out = append(out, d.String()) }))
	return out
}

func TestCompare(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(t *testing.T, dir string) // of the second tree
		want   []string
	}{
		{"equal", func(*testing.T, string) {}, nil},
		{"times", func(t *testing.T, dir string) { must(t, os.Chtimes(dir+"/sub/file", time.Time{}, time.Unix(1, 0))) }, nil},
		{"content of the same size and time", func(t *testing.T, dir string) {
			st, err := os.Stat(dir + "/sub/file")
			must(t, err)
			must(t, os.WriteFile(dir+"/sub/file", []byte("DATA"), 0o644))
			must(t, os.Chtimes(dir+"/sub/file", time.Time{}, st.ModTime()))
		}, []string{"/sub/file (content)"}},
		{"size", func(t *testing.T, dir string) { must(t, os.Truncate(dir+"/sub/file", 2)) }, []string{"/sub/file (size)"}},
		{"mode", func(t *testing.T, dir string) { must(t, os.Chmod(dir+"/sub/file", 0o600)) }, []string{"/sub/file (mode)"}},
		{"mode of a directory and what is in it", func(t *testing.T, dir string) {
			must(t, os.Chmod(dir+"/sub", 0o700))
			must(t, os.Remove(dir+"/sub/file"))
		}, []string{"/sub (mode)", "/sub/file (only in the first)"}},
		{"mode of the root", func(t *testing.T, dir string) { must(t, os.Chmod(dir, 0o711)) }, []string{"/ (mode)"}},
		{"owner", func(t *testing.T, dir string) { must(t, os.Lchown(dir+"/link", 1, 2)) }, []string{"/link (owner)"}},
		{"link target", func(t *testing.T, dir string) {
			must(t, os.Remove(dir+"/link"))
			must(t, os.Symlink("elsewhere", dir+"/link"))
		}, []string{"/link (link target)"}},
		{"type", func(t *testing.T, dir string) {
			must(t, os.Remove(dir+"/link"))
			must(t, os.Mkdir(dir+"/link", 0o777))
		}, []string{"/link (type)"}},
		{"device", func(t *testing.T, dir string) {
			must(t, os.Remove(dir+"/null"))
			must(t, unix.Mknod(dir+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))))
		}, []string{"/null (device)"}},
		{"capabilities", func(t *testing.T, dir string) {
			must(t, unix.Setxattr(dir+"/sub/file", "security.capability", []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0))
		}, []string{"/sub/file (capabilities)"}},
		{"what no layer holds", func(t *testing.T, dir string) {
			must(t, unix.Setxattr(dir+"/sub/file", "user.a", []byte("value"), 0))
			must(t, unix.Mknod(dir+"/socket", unix.S_IFSOCK|0o600, 0))
		}, nil},
		{"more and less", func(t *testing.T, dir string) {
			must(t, os.RemoveAll(dir+"/sub"))
			writeFile(t, dir+"/a/b", "")
			writeFile(t, dir+"/z", "")
		}, []string{"/a (only in the second)", "/sub (only in the first)", "/z (only in the second)"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dirs := [2]string{filepath.Join(t.TempDir(), "a"), filepath.Join(t.TempDir(), "b")}
			for _, dir := range dirs {
				writeFile(t, dir+"/sub/file", "data")
				must(t, os.Symlink("sub/file", dir+"/link"))
				must(t, unix.Mknod(dir+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
				must(t, unix.Mkfifo(dir+"/fifo", 0o600))
			}
			c.change(t, dirs[1])
			if got := compare(t, dirs[0], dirs[1]); !slices.Equal(got, c.want) {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

func TestCompareStops(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, dir+"/x", "")
	v := openView(t, bindMount(dir, "ro"))
	defer v.Close()
	ctx, cancel := context.WithCancelCause(context.Background())
	cause := errors.New("enough")
	cancel(cause)
	if err := snapshot.Compare(ctx, v, v, func(snapshot.Difference) {}); !errors.Is(err, cause) {
		t.Errorf("error %v, want the cause of the context's end", err)
	}
}
