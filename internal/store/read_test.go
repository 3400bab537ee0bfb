package store

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
)

// Readers, writers and commits that grow the file get past each other.
func TestReadWhileTheFileGrows(t *testing.T) {
	d := openAt(t, t.TempDir(), nil)
	var done atomic.Bool
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			for !done.Load() {
				d.Read(func(r *Reader) {
					for i := range 10 {
						r.Scan("x", fmt.Sprint(i), func(string, []byte) bool { return true })
					}
				})
				d.Scan("x", "1", func(string, []byte) bool { return true })
				put(d, "y", "key", "value")
			}
		})
	}
	for i := range 60 {
		put(d, "x", fmt.Sprint(i), string(make([]byte, 64<<10)))
		mustSync(t, d)
	}
	done.Store(true)
	readers.Wait()
}

// A reader sees all that was written before, whether a commit is under way or
// not, and each record once.
func TestReader(t *testing.T) {
	d := openAt(t, t.TempDir(), nil)
	put(d, "x", "a1", "stored")
	put(d, "x", "a2", "stored")
	put(d, "x", "b", "stored")
	mustSync(t, d)
	put(d, "x", "a2", "pending")
	put(d, "x", "a3", "pending")
	gone := &Batch{}
	gone.Delete("x", "a1")
	d.Write(gone)
	for range 2 {
		got := ""
		d.Read(func(r *Reader) {
			for _, bucket := range []string{"x", "none"} {
				r.Scan(bucket, "a", func(key string, value []byte) bool {
					got += key + "=" + string(value) + " "
					return true
				})
			}
			r.Scan("x", "", func(key string, _ []byte) bool {
				got += key
				return false // the first
			})
		})
		if want := "a2=pending a3=pending a2"; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
		mustSync(t, d)
	}
}
