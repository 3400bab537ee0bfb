package store

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	"github.com/docker/go-units"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// maxBackoff is the most by which failed commits in a row stretch the delay, as
// a power of two. A Sync doesn't wait for it.
const maxBackoff = 6

// run commits groups until Close. It sleeps while nothing is written.
func (d *DB) run() {
	defer close(d.stopped)
	d.resumeJournal()
	failed := 0 // commits in a row
	for {
		select {
		case <-d.wake:
			d.gather(failed)
		case <-d.hurry:
		case <-d.closing:
			if !d.commit(failed > 0) {
				d.commit(true) // without what was lost; a full disk may have got room
			}
			return
		}
		if d.commit(failed > 0) {
			failed = 0
		} else {
			failed++
		}
	}
}

// resumeJournal writes the journal anew if it isn't the database's. The start
// doesn't wait for that, which takes as long as the disk does for all records;
// commits and checks do, by the lock that Open has taken.
func (d *DB) resumeJournal() {
	defer d.committing.Unlock()
	d.journal.catchUp(d.bolt, false)
}

// ends says whether somebody waits in Close.
func (d *DB) ends() bool {
	select {
	case <-d.closing:
		return true
	default:
		return false
	}
}

// gather gives a group time to grow.
func (d *DB) gather(failed int) {
	timer := time.NewTimer(d.delay << min(failed, maxBackoff))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-d.hurry:
	case <-d.closing:
	}
}

// commit makes the current group durable. After a failure its content is part
// of the next one. It reports whether all is well; again says that the last one
// wasn't.
func (d *DB) commit(again bool) bool {
	d.mu.Lock()
	g := d.current
	if g.empty() {
		d.mu.Unlock()
		return !again
	}
	d.flying, d.current = g, newGroup()
	drain(d.wake) // what was signalled so far was for g
	drain(d.hurry)
	d.mu.Unlock()
	d.seal(g)

	d.committing.Lock()
	err := d.persistReserved(g)
	d.committing.Unlock()

	if err == nil { // g is in flight until they have run: a Sync waits for them, too
		for _, fn := range g.onDurable {
			fn()
		}
	}
	d.mu.Lock()
	d.flying = nil
	if err == nil {
		d.durable = max(d.durable, g.last) // a Verify has written nothing
	} else {
		d.current.under(g)
		d.current.failure = err // for Close, should there be no other try
	}
	d.mu.Unlock()

	if lost := (*syncError)(nil); errors.As(err, &lost) {
		d.callDoubt(lost)
	}
	switch {
	case err == nil && again:
		d.warn("the database is written again", "path", d.path)
	case err != nil && !again:
		d.warn("the database can't be written; changes are kept in memory and tried again", "error", err)
	}
	g.failure = err
	close(g.done)
	return err == nil
}

// seal puts all keys of g, which is in flight, in order; reading doesn't change g
// any more then. Nobody waits for that, as long as it takes for a large group: who
// has to look for a range meanwhile puts the keys in order, too.
func (d *DB) seal(g *group) {
	for _, p := range g.buckets {
		d.mu.RLock()
		sorted, fresh := p.sorted, slices.Clone(p.fresh)
		d.mu.RUnlock()
		slices.Sort(fresh)
		sorted = mergeKeys(sorted, fresh)
		d.mu.Lock()
		p.sorted, p.fresh = sorted, nil
		d.mu.Unlock()
	}
}

// drain takes the signal out of ch, if there is one.
func drain(ch chan struct{}) {
	select {
	case <-ch:
	default:
	}
}

// write is the real persist: files first, then the journal, then the records.
func (d *DB) write(g *group) error {
	if d.broken.Load() {
		return fmt.Errorf("write %s: the file is damaged; the next start sets it aside", d.path)
	}
	if !g.onlyRemoves() {
		if err := d.syncFiles(); err != nil {
			return d.explain(err, g)
		}
	}
	if !g.records() {
		return nil
	}
	err := d.prepareGround(g)
	if err == nil {
		err = d.checkWritable()
	}
	if err != nil {
		return d.explain(err, g)
	}
	err = guard(func() error {
		return d.bolt.Update(func(tx *bbolt.Tx) error {
			at, err := g.apply(tx)
			if err == nil {
				d.journal.append(at, g)
			}
			return err
		})
	})
	if err == nil {
		d.journal.catchUp(d.bolt, !d.ends())
		if err = d.checkWritable(); err != nil {
			err = d.explain(err, g) // it may not be there; what is written twice does no harm
		}
		return err
	}
	d.journal.undo()
	var p *panicError
	if errors.As(err, &p) {
		d.broken.Store(true)
		d.tellSuspect(err)
	}
	return d.explain(fmt.Errorf("write %d bytes of records to %s: %w", g.size, d.path, err), g)
}

// apply puts the group into tx, in order, which is what bbolt is fastest at, and
// returns where the database stands then.
func (g *group) apply(tx *bbolt.Tx) (at position, err error) {
	if at, err = positionOf(tx); err != nil {
		return at, err
	}
	at.seq++
	for _, bucket := range sortedKeys(g.buckets) {
		b, err := tx.CreateBucketIfNotExists([]byte(bucket))
		if err != nil {
			return at, fmt.Errorf("bucket %s: %w", bucket, err)
		}
		p, h, c := g.buckets[bucket], hashBucket(bucket), b.Cursor()
		for _, name := range p.sorted {
			key, e := []byte(name), p.entries[name]
			found, old := c.Seek(key)
			there := bytes.Equal(found, key)
			if there {
				at.sum -= h.record(key, old)
			}
			switch {
			case !e.deleted:
				err = b.Put(key, e.value)
				at.sum += h.record(key, e.value)
			case there:
				err = c.Delete()
			}
			if err != nil {
				return at, fmt.Errorf("key %q of bucket %s: %w", name, bucket, err)
			}
		}
	}
	meta := tx.Bucket([]byte(metaBucket))
	if g.proven {
		if err := meta.Delete([]byte(unprovenKey)); err != nil {
			return at, err
		}
	}
	return at, meta.Put([]byte(positionKey), at.encode())
}

// explain adds the numbers to an error about a full disk, and what an I/O error
// means.
func (d *DB) explain(err error, g *group) error {
	switch {
	case isFull(err):
		var st unix.Statfs_t
		if serr := unix.Fstatfs(int(d.root.Fd()), &st); serr != nil {
			return err
		}
		bs := float64(st.Bsize)
		return fmt.Errorf("%w: needs about %s, %s of %s are free on the file system of %s", err,
			units.BytesSize(g.need()), units.BytesSize(float64(st.Bavail)*bs), units.BytesSize(float64(st.Blocks)*bs), d.root.Name())
	case errors.Is(err, syscall.EIO):
		return fmt.Errorf("%w: the disk fails; the kernel's log says how", err)
	case errors.Is(err, syscall.EROFS):
		return fmt.Errorf("%w: nothing can be written any more; if the disk has failed, as the kernel's log then says, stop the daemon, check and mount the file system again, and start the daemon", err)
	}
	return err
}

// need estimates what a commit takes: bbolt rewrites a leaf for about every
// page of records, and the branches above it.
func (g *group) need() float64 {
	return float64(2*g.size + 16*4096)
}
