package store

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
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
	if err := d.Sync(t.Context()); !isFull(err) {
		t.Fatalf("what removes nothing had the reserve: %v", err)
	}
	b = Batch{}
	b.Delete("b", "other")
	d.Write(&b)
	if err := d.Sync(t.Context()); err != nil {
		t.Fatalf("with a reserve: %v", err)
	}
	if _, err := os.Stat(reserve); err != nil {
		t.Errorf("the reserve was not taken again: %v", err)
	}
}

// When there isn't room for all of the reserve, it is what there is, so that
// several removals in a row find some.
func TestReserveIsWhatThereIs(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts a file system: it needs root")
	}
	root := t.TempDir()
	if err := unix.Mount("small", root, "tmpfs", 0, "size=4m"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(root, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	d, err := Open(Options{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	filler, err := os.Create(filepath.Join(root, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	defer filler.Close()
	fill := func() {
		for err == nil {
			_, err = filler.Write(make([]byte, 4096))
		}
		if !isFull(err) {
			t.Fatal(err)
		}
		err = nil
	}
	value := make([]byte, 20<<10)
	for i := range 8 {
		fill()
		var b Batch
		b.Delete("b", "old")
		b.Put("b", fmt.Sprint(i), value)
		d.Write(&b)
		if err := d.Sync(t.Context()); err != nil {
			st, serr := os.Stat(d.reservePath())
			t.Fatalf("removal %d: %v; reserve %v %v", i, err, st, serr)
		}
	}
	if err := os.Truncate(filler.Name(), 0); err != nil {
		t.Fatal(err)
	}
	var b Batch
	b.Put("b", "k", nil)
	d.Write(&b)
	if err := d.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, reserve, _, err := d.Size(); err != nil || reserve != reserveSize {
		t.Errorf("with room again the reserve is %d, %v", reserve, err)
	}
}
