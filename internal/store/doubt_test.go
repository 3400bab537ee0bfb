package store

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// failSync makes the next sync of files fail with err.
func failSync(d *DB, err error) {
	d.committing.Lock()
	defer d.committing.Unlock()
	real := d.sync
	d.sync = func() error {
		d.sync = real
		return err
	}
}

// What stood on files that the kernel couldn't write doesn't reach the disk with
// the next commit, whose sync knows nothing of them any more.
func TestLostFilesAreNotCommitted(t *testing.T) {
	for _, errno := range []error{syscall.EIO, syscall.ENOSPC} {
		t.Run(errno.Error(), func(t *testing.T) {
			root := t.TempDir()
			d, err := Open(Options{Root: root, Delay: manual})
			if err != nil {
				t.Fatal(err)
			}
			begun := time.Now()
			put(d, "b", "good", "1")
			mustSync(t, d)
			good := d.Synced()
			if good.Before(begun) {
				t.Errorf("synced at %s, asked for at %s", good, begun)
			}
			var asked []time.Time
			d.OnDoubt(func(since time.Time, why error) {
				asked = append(asked, since)
				if !errors.Is(why, errno) {
					t.Errorf("doubt because of %v", why)
				}
				b := &Batch{}
				b.Delete("b", "suspect")
				d.Write(b)
			})
			failSync(d, errno)
			b := &Batch{}
			b.Put("b", "suspect", []byte("2"))
			b.Put("b", "else", []byte("3"))
			b.Delete("b", "never") // a full disk must not make it use the reserve
			d.Write(b)
			if err := d.Sync(t.Context()); !errors.Is(err, errno) || !strings.Contains(err.Error(), root) {
				t.Errorf("error %v", err)
			}
			mustSync(t, d)
			if len(asked) != 1 || !asked[0].Equal(good) {
				t.Errorf("doubts since %v, want one since %s", asked, good)
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			for _, lost := range []string{"", fileName} { // the journal says the same
				if lost != "" {
					if err := os.Remove(filepath.Join(root, lost)); err != nil {
						t.Fatal(err)
					}
				}
				d = openAt(t, root, &warnings{})
				if got := scan(d, "b", ""); got != "else=3 good=1" {
					t.Errorf("stored %q", got)
				}
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// That holds for the last commit, too, which is tried once more.
func TestLostFilesAtClose(t *testing.T) {
	root := t.TempDir()
	d, err := Open(Options{Root: root, Delay: manual})
	if err != nil {
		t.Fatal(err)
	}
	d.OnDoubt(func(time.Time, error) {
		b := &Batch{}
		b.Delete("b", "suspect")
		d.Write(b)
	})
	failSync(d, syscall.EIO)
	put(d, "b", "suspect", "2")
	put(d, "b", "else", "3")
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	put(d, "b", "late", "4")
	d = openAt(t, root, &warnings{})
	if got := scan(d, "b", ""); got != "else=3" {
		t.Errorf("stored %q", got)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}

// Who asks is told of lost files even if nothing is to be committed.
func TestVerify(t *testing.T) {
	d, err := Open(Options{Root: t.TempDir(), Delay: manual})
	if err != nil {
		t.Fatal(err)
	}
	put(d, "b", "k", "v")
	mustSync(t, d)
	if err := d.Verify(t.Context()); err != nil {
		t.Error(err)
	}
	mustSync(t, d)
	doubts := 0
	d.OnDoubt(func(time.Time, error) { doubts++ })
	failSync(d, syscall.EIO)
	if err := d.Verify(t.Context()); !errors.Is(err, syscall.EIO) || doubts != 1 {
		t.Errorf("%d doubts, error %v", doubts, err)
	}
	if err := d.Verify(t.Context()); err != nil || doubts != 1 {
		t.Errorf("%d doubts, error %v", doubts, err)
	}
	stopped, cancel := context.WithCancelCause(t.Context())
	why := errors.New("enough")
	cancel(why)
	d.committing.Lock()
	err = d.Verify(stopped)
	d.committing.Unlock()
	if !errors.Is(err, why) {
		t.Errorf("error %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := d.Verify(t.Context()); !errors.Is(err, errClosed) {
		t.Errorf("error %v", err)
	}
}

// Whoever asks after a time is told of files that were lost in between, also when
// somebody else has been told, and no commit fails any more.
func TestSyncSince(t *testing.T) {
	d, err := Open(Options{Root: t.TempDir(), Delay: manual})
	if err != nil {
		t.Fatal(err)
	}
	put(d, "b", "good", "1")
	mustSync(t, d)
	d.OnDoubt(func(time.Time, error) { put(d, "b", "doubted", "1") })
	before := d.Mark()
	failSync(d, syscall.EIO)
	put(d, "b", "suspect", "2")
	if err := d.Sync(t.Context()); !errors.Is(err, syscall.EIO) {
		t.Errorf("error %v", err)
	}
	mustSync(t, d)
	for range 2 {
		if err := d.SyncSince(t.Context(), before); !errors.Is(err, syscall.EIO) {
			t.Errorf("since before the loss: error %v", err)
		}
	}
	after := d.Mark()
	put(d, "b", "good", "3")
	if err := d.SyncSince(t.Context(), after); err != nil {
		t.Errorf("since after the loss: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}
