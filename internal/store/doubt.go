package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// syncError says that files of the last time may not be on the disk, and never
// will be: the kernel has given up what it couldn't write, and tells so once.
type syncError struct{ err error }

func (e *syncError) Error() string { return e.err.Error() }
func (e *syncError) Unwrap() error { return e.err }

// OnDoubt registers fn to be called, in the store's own goroutine, when files that
// were written since the given time may be damaged. fn takes what stands on such
// files out of use, with a Write for what was written of it, which then reaches
// the disk together with that or not at all. It must not call Sync or Verify.
func (d *DB) OnDoubt(fn func(since time.Time, why error)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.doubt = append(d.doubt, fn)
}

// Verify waits until all files are durable, whether or not there is anything to
// commit. If some can't be, it returns why, after what OnDoubt registered was
// called. Whoever meets an error of the disk calls it: the kernel may know of
// files that were lost and that nobody has asked for, and lets nothing be mounted
// on them until somebody does.
func (d *DB) Verify(ctx context.Context) error {
	if d.readOnly {
		return nil
	}
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return errClosed
	}
	g := d.current
	g.verify = true
	signal(d.hurry)
	d.mu.Unlock()
	return d.await(ctx, g)
}

// await waits for the outcome of the group.
func (d *DB) await(ctx context.Context, g *group) error {
	select {
	case <-g.done:
		return g.failure
	case <-d.stopped:
		return g.outcome()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// syncFiles makes the files of the group durable.
func (d *DB) syncFiles() error {
	began := time.Now()
	if err := d.sync(); err != nil {
		return &syncError{fmt.Errorf("sync the file system of %s: %w", d.root.Name(), err)}
	}
	if err := d.checkWritable(); err != nil {
		return err
	}
	d.mu.Lock()
	d.synced = began
	d.mu.Unlock()
	return nil
}

// Synced is a time: files that weren't written since are durable.
func (d *DB) Synced() time.Time {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.synced
}

func (d *DB) syncfs() error { return unix.Syncfs(int(d.root.Fd())) }

// callDoubt tells that files were lost.
func (d *DB) callDoubt(why *syncError) {
	d.journal.doubt(why)
	d.mu.Lock()
	fns, since := d.doubt, d.synced
	d.doubting = true
	d.mu.Unlock()
	for _, fn := range fns {
		fn(since, why)
	}
	d.mu.Lock()
	d.doubting = false
	// That what was written up to now had its files in time isn't known of any.
	d.lost, d.why = d.written, why
	d.mu.Unlock()
}

// doubt ends the journal, of which a part may have been lost; it is written anew.
func (j *journal) doubt(why error) {
	if j.file != nil {
		j.fail(errors.New("a part of it may be lost: " + why.Error()))
	}
}
