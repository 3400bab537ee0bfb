// Package store is kiln's one database: a key-value store in a single bbolt
// file, written in groups.
//
// A write is a Batch. Batches are visible to readers at once and become durable
// together: a group commit first makes the files under the root durable (one
// syncfs, if there may be such that its records point to), then commits
// everything queued so far in one bbolt transaction. A
// crash therefore loses at most the last group, and a record never outlives
// the files it points to. Removal goes the other way round: delete the record,
// and remove files in the batch's OnDurable.
//
// What isn't in bbolt yet is in at most two groups in memory: the one that
// batches are added to, and the one being committed. A reader looks at them in
// this order and at bbolt last. When a commit fails, the two become one, and
// the next write or Sync tries again.
//
// A syncfs that fails is another matter: the kernel has given up what it couldn't
// write, and the next one succeeds without it. So before anything is tried again,
// whoever keeps files is told to take those written lately out of use (doubt.go).
//
// The database is believed only as far as it is proven. Every commit stores the
// sum of the hashes of all records with its number, and every start reads the
// whole file, about half a microsecond a record, and compares (inspect.go). A
// file that is damaged or gone is rebuilt from the journal, which has a marker
// of every commit (journal.go). What the two files hold is drawn in schema.md.
//
// Locks: DB.committing is held during a commit, DB.mu guards the groups and
// counters and is never held during one, nor while a transaction begins. It comes
// after committing and after bbolt's locks.
package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"
)

// Options says where and how a DB is opened.
type Options struct {
	// Root is the state directory. Its file system is synced before records
	// are committed. The database is the file kiln.db in it.
	Root string
	// Locked is what Lock has returned for Root; it is the DB's from then on, and
	// is closed if there comes to be none. If it is nil, Open locks Root.
	Locked *os.File
	// Delay is how long the first write of a group waits for others; 0 means
	// DefaultDelay.
	Delay time.Duration
	// Warn is told of what a user should know: a damaged database set aside,
	// a failed commit. It may be nil.
	Warn func(msg string, args ...any)
	// ReadOnly leaves everything on disk as it is: batches stay in memory and
	// are never durable, and a damaged or missing database is an error.
	ReadOnly bool
}

// DefaultDelay bounds what a crash can lose.
const DefaultDelay = 100 * time.Millisecond

// DB is the database. All methods are safe for concurrent use.
type DB struct {
	path     string
	root     *os.File // the state directory, for syncfs, and locked
	delay    time.Duration
	warn     func(msg string, args ...any)
	bolt     *bbolt.DB
	readOnly bool
	unproven atomic.Bool
	partial  bool // it was rebuilt in part

	// committing is held while the files are written, so that Check sees them
	// at rest.
	committing sync.Mutex
	journal    *journal // the committer's, and its opener's

	// persist makes a group durable. Tests replace it to fail commits.
	persist func(*group) error
	spent   bool  // the reserve isn't complete; the committer's alone
	ground  int64 // up to here the file has no holes; the committer's alone

	sync func() error // makes files durable; tests replace it

	wake    chan struct{} // there is something to commit
	hurry   chan struct{} // someone waits for it
	closing chan struct{}
	stopped chan struct{} // the committer has returned

	mu       sync.RWMutex // guards the fields below
	current  *group       // takes writes
	flying   *group       // being committed, or nil
	written  Mark         // of the newest batch
	durable  Mark         // up to here all is on disk, but for what was lost
	lost     Mark         // of the newest batch whose files were lost, or may be
	why      error        // they were
	closed   bool
	doubting bool      // what was lost is taken out of use, also after Close
	synced   time.Time // when the last syncfs that succeeded began
	doubt    []func(since time.Time, why error)

	// broken is set when bbolt panicked inside a write transaction. Its locks
	// may be held for good then, so that nothing may write any more.
	broken  atomic.Bool
	suspect sync.Once
}

// errClosed is what calls after Close get.
var errClosed = errors.New("the database is closed")

// Close commits what is queued and closes the file.
func (d *DB) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	d.mu.Unlock()
	if d.readOnly {
		return errors.Join(d.bolt.Close(), d.root.Close())
	}
	close(d.closing)
	<-d.stopped

	d.mu.RLock()
	last := d.current
	d.mu.RUnlock()
	err := last.failure
	if !d.broken.Load() {
		if cerr := d.bolt.Close(); cerr != nil {
			err = errors.Join(err, fmt.Errorf("close %s: %w", d.path, cerr))
		}
	}
	return errors.Join(err, d.journal.close(), d.root.Close())
}

// Mark is a moment, by how much was written before.
type Mark uint64

// Write makes b visible at once and durable within the group commit's delay.
// It never waits for the disk.
//
// A batch that bbolt could never store (an empty key, one beyond 32 KB) is
// dropped as a whole with a warning: kept, it would make every later commit fail.
func (d *DB) Write(b *Batch) {
	if b.last != nil {
		b.under.Lock()
		defer b.under.Unlock()
		b.last()
	}
	if b.bad != nil {
		d.warn("a record can't be stored and is dropped", "error", b.bad)
		return
	}
	if len(b.changes) == 0 && len(b.onDurable) == 0 && !b.proven {
		return
	}
	if b.proven {
		d.unproven.Store(false)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed && !d.doubting {
		d.warn("a write after the database was closed is dropped", "changes", len(b.changes))
		return
	}
	d.written++
	d.current.add(b, d.written)
	signal(d.wake) // under the lock, so that commit knows which group it is for
}

// Mark is now.
func (d *DB) Mark() Mark {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.written
}

// Sync waits until everything written before the call is durable and its
// OnDurable functions have run. It returns the error of the commit that failed;
// what was written stays queued and is tried again.
//
// It says nothing of what an earlier commit has lost: ask SyncSince for that.
func (d *DB) Sync(ctx context.Context) error {
	target := d.Mark()
	if d.readOnly {
		return nil
	}
	d.mu.RLock()
	group := d.flying
	if d.durable >= target {
		d.mu.RUnlock()
		return nil
	}
	if d.closed {
		d.mu.RUnlock()
		return errClosed
	}
	if group == nil || group.last < target {
		group = d.current
		signal(d.hurry)
	}
	d.mu.RUnlock()
	return d.await(ctx, group)
}

// SyncSince is Sync, and returns an error as well if files of a batch after since,
// the mark of an earlier time, were lost or may be: such a batch, or a part of it,
// was taken back by those whom OnDoubt has registered, and isn't tried again.
func (d *DB) SyncSince(ctx context.Context, since Mark) error {
	if err := d.Sync(ctx); err != nil {
		return err
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.lost > since {
		return d.why
	}
	return nil
}

// Get returns the value of key in bucket. The value must not be changed.
func (d *DB) Get(bucket, key string) (value []byte, ok bool) {
	d.mu.RLock()
	for _, g := range [...]*group{d.current, d.flying} {
		if e, found := g.get(bucket, key); found {
			d.mu.RUnlock()
			return e.value, !e.deleted
		}
	}
	d.mu.RUnlock()
	// A commit between here and there only moves the truth into bbolt.
	err := d.view(func(tx *bbolt.Tx) error {
		if b := tx.Bucket([]byte(bucket)); b != nil {
			if v := b.Get([]byte(key)); v != nil {
				// bbolt's memory is valid during the transaction only.
				value, ok = append(make([]byte, 0, len(v)), v...), true
			}
		}
		return nil
	})
	if err != nil {
		return nil, false
	}
	return value, ok
}

// view runs fn in a read transaction.
func (d *DB) view(fn func(tx *bbolt.Tx) error) error {
	return d.attempt(func() error { return d.bolt.View(fn) })
}

// attempt runs fn, which reads with bbolt. A damaged file makes bbolt panic or the
// memory map fault; readers then see nothing rather than the daemon dying, and
// the next start finds out.
func (d *DB) attempt(fn func() error) error {
	err := guard(fn)
	var p *panicError
	if errors.As(err, &p) {
		d.tellSuspect(err)
	}
	return err
}

// tellSuspect tells, once, that bbolt can't read the file.
func (d *DB) tellSuspect(cause error) {
	d.suspect.Do(func() {
		d.warn("the database can't be read; restart the daemon to have it examined, set aside and rebuilt", "path", d.path, "error", cause)
	})
}

// panicError is a panic or memory fault inside bbolt.
type panicError struct{ value any }

func (e *panicError) Error() string { return fmt.Sprintf("bbolt panicked: %v", e.value) }

// guard turns a panic or memory fault in fn into an error.
func guard(fn func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if v := recover(); v != nil {
			err = &panicError{v}
		}
	}()
	return fn()
}

// Check looks at every page of the file, and at the journal. What is queued but
// not committed yet isn't looked at.
func (d *DB) Check() error {
	d.committing.Lock()
	defer d.committing.Unlock()
	_, err := inspect(d.path)
	if err != nil {
		err = fmt.Errorf("check %s: %w", d.path, err)
	}
	return errors.Join(err, d.journal.check())
}

// RepairJournal writes the journal anew if it is damaged, and says so.
func (d *DB) RepairJournal() (rewritten bool, err error) {
	d.committing.Lock()
	defer d.committing.Unlock()
	if d.readOnly || d.journal.check() == nil {
		return false, nil
	}
	return true, guard(func() error { return d.bolt.View(d.journal.rewrite) })
}

// signal wakes the receiver of ch, which has room for one.
func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// sortedKeys returns the keys of m in order.
func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
