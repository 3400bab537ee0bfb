package store

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// A commit that finds the disk full goes through with the reserve, which is
// taken again when there is room.
func TestReserveIsGivenUpWhenTheDiskIsFull(t *testing.T) {
	root := t.TempDir()
	d, err := Open(Options{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	reserve := filepath.Join(root, reserveName)
	if st, err := os.Stat(reserve); err != nil || st.Size() != reserveSize {
		t.Fatalf("the reserve: %v, %v", st, err)
	}
	// The disk is full as long as the reserve is there.
	full := true
	d.persist = func(g *group) error {
		if _, err := os.Stat(reserve); err == nil && full {
			return fmt.Errorf("write: %w", syscall.ENOSPC)
		}
		full = false
		return d.write(g)
	}
	var b Batch
	b.Put("b", "k", []byte("v"))
	d.Write(&b)
	if err := d.Sync(t.Context()); err != nil {
		t.Fatalf("with a reserve: %v", err)
	}
	if _, err := os.Stat(reserve); err != nil {
		t.Errorf("the reserve was not taken again: %v", err)
	}
}
