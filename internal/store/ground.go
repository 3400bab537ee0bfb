package store

import (
	"fmt"
	"os"
	"syscall"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

const (
	leastGround = 64 << 10
	mostGround  = 1 << 20
)

var zeros [leastGround]byte

// prepareGround writes zeros where the commit of g may put pages at the end of the
// database, and makes them durable.
//
// bbolt leaves holes there. A page that is written into a hole isn't in the file
// before the file system has noted that it is, which it does last; if that fails,
// ext4 goes read-only, says that the file is synced, and has zeros in place of the
// page at the next mount. bbolt would by then have written what points to it.
// Overwriting what is in the file already needs no note.
func (d *DB) prepareGround(g *group) error {
	var used int64
	if err := d.view(func(tx *bbolt.Tx) error { used = tx.Size(); return nil }); err != nil {
		return err
	}
	// bbolt writes neighbours anew. Where those are some MB it may need more still.
	need := used + 2*int64(g.need())
	if need <= d.ground {
		return nil
	}
	from, to := max(used, d.ground), need+min(max(leastGround, used/8), mostGround)
	f, err := os.OpenFile(d.path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // it was synced
	for at := from; at < to && err == nil; at += int64(len(zeros)) {
		_, err = f.WriteAt(zeros[:min(to-at, int64(len(zeros)))], at)
	}
	if err == nil {
		err = unix.Fdatasync(int(f.Fd()))
	}
	switch {
	case isFull(err):
		return nil // the commit may do with free pages
	case err != nil:
		return fmt.Errorf("extend %s to %d bytes: %w", d.path, to, err)
	}
	d.ground = to
	return nil
}

// checkWritable returns an error if the file system has become read-only: it then
// says of everything that it is synced.
func (d *DB) checkWritable() error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(d.root.Fd()), &st); err != nil {
		return err
	}
	if st.Flags&unix.ST_RDONLY != 0 {
		return fmt.Errorf("sync the file system of %s: %w", d.root.Name(), syscall.EROFS)
	}
	return nil
}
