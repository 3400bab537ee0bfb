package files

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Large files go through the kernel or a buffer, in pieces, and come out whole.
func TestCopyLarge(t *testing.T) {
	src, dst := t.TempDir(), t.TempDir()
	for _, size := range []int{1, bufferSize - 1, bufferSize, bufferSize + 1, 3<<20 + 7} {
		data := bytes.Repeat([]byte("0123456789abcdef!"), size/17+1)[:size]
		if err := os.WriteFile(filepath.Join(src, "f"), data, 0o644); err != nil {
			t.Fatal(err)
		}
		for _, noRange := range []bool{false, true} {
			from, err := os.Open(filepath.Join(src, "f"))
			if err != nil {
				t.Fatal(err)
			}
			to, err := os.Create(filepath.Join(dst, "f"))
			if err != nil {
				t.Fatal(err)
			}
			var c Copier
			c.noRange.Store(noRange)
			st := unix.Stat_t{Size: int64(size), Blocks: int64(size)}
			err = errors.Join(c.Copy(t.Context(), int(to.Fd()), int(from.Fd()), &st), from.Close(), to.Close())
			if got, rerr := os.ReadFile(filepath.Join(dst, "f")); err != nil || rerr != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes: %v, %v, differs", size, err, rerr)
			}
		}
	}
}
