package store

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// As the database grows, no page of it is in a hole of the file when it is written.
func TestNoPageIsWrittenIntoAHole(t *testing.T) {
	for _, size := range []int{100, 5000, 300_000} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			root := t.TempDir()
			for life := range 2 {
				d, err := Open(Options{Root: root, Delay: manual})
				if err != nil {
					t.Fatal(err)
				}
				real := d.persist
				d.persist = func(g *group) error {
					err := real(g)
					var used int64
					d.bolt.View(func(tx *bbolt.Tx) error { used = tx.Size(); return nil }) // doesn't fail
					if used > d.ground {
						t.Errorf("life %d: %d bytes are used, %d were prepared", life, used, d.ground)
					}
					return err
				}
				for i := range 12 {
					put(d, "b", fmt.Sprint(life, i), strings.Repeat("x", size))
					mustSync(t, d)
				}
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
			}
			f, err := os.Open(root + "/" + fileName)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			info, err := f.Stat()
			if err != nil {
				t.Fatal(err)
			}
			if hole, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_HOLE); err != nil || hole != info.Size() {
				t.Errorf("of %d bytes there is a hole at %d, error %v", info.Size(), hole, err)
			}
		})
	}
}
