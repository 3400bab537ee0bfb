package files

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// A whole tree goes, whatever is in it; what symlinks lead to stays, and so does
// what is beside it.
func TestRemoveAll(t *testing.T) {
	dir := t.TempDir()
	make := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	tree := filepath.Join(dir, "tree")
	make(os.MkdirAll(filepath.Join(tree, "a", "b", "c"), 0o755))
	make(os.MkdirAll(filepath.Join(tree, "shut"), 0o755))
	make(os.MkdirAll(filepath.Join(dir, "kept"), 0o755))
	make(os.WriteFile(filepath.Join(dir, "kept", "f"), nil, 0o644))
	make(os.Symlink(filepath.Join(dir, "kept"), filepath.Join(tree, "a", "link")))
	make(unix.Mkfifo(filepath.Join(tree, "a", "fifo"), 0o644))
	make(os.Link(filepath.Join(dir, "kept", "f"), filepath.Join(tree, "a", "b", "hard")))
	for i := range 2000 { // more than fit into one read of a directory
		make(os.WriteFile(filepath.Join(tree, "a", "b", "file with a rather long name "+strconv.Itoa(i)), nil, 0o644))
	}
	make(os.Chmod(filepath.Join(tree, "shut"), 0))
	make(RemoveAll(unix.AT_FDCWD, tree))
	if _, err := os.Lstat(tree); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the tree is still there: %v", err)
	}
	if _, err := os.Lstat(filepath.Join(dir, "kept", "f")); err != nil {
		t.Errorf("what a link led to: %v", err)
	}
	make(RemoveAll(unix.AT_FDCWD, tree)) // missing
	make(RemoveAll(unix.AT_FDCWD, filepath.Join(dir, "kept", "f")))
}

// A tree may be removed twice at once.
func TestRemoveAllTwice(t *testing.T) {
	tree := filepath.Join(t.TempDir(), "tree")
	for i := range 200 {
		if err := os.MkdirAll(filepath.Join(tree, strconv.Itoa(i), "x"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var work sync.WaitGroup
	for range 4 {
		work.Go(func() {
			if err := RemoveAll(unix.AT_FDCWD, tree); err != nil {
				t.Error(err)
			}
		})
	}
	work.Wait()
	if _, err := os.Lstat(tree); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the tree is still there: %v", err)
	}
}
