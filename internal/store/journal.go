package store

import (
	"errors"
	"fmt"
	"os"

	"go.etcd.io/bbolt"
)

const (
	journalName = "kiln.journal"
	// journalSlack is by how much the journal may outgrow twice what it took
	// when it was last written anew.
	journalSlack = 4 << 20
	// chunk is about how much of the database an entry of a new journal holds.
	chunk = 1 << 20
)

// journal is the file of commit markers: an entry for every commit, with all
// that it changed. From it a lost or damaged database is rebuilt, keys and all,
// to the very commit.
//
// An entry is written after the files that its records point to are durable and
// before bbolt commits, so that its being there proves them. It isn't synced on
// its own: a dying process leaves it in the kernel's hands, and the next syncfs
// takes it along. So only a power cut, and only together with the loss of the
// database, costs the last groups: one that records something, and deletions and
// notes after it. What these deleted is then found to have lost its files.
//
// It never makes a commit fail. When it can't be written, it ends, and is written
// anew as a whole when that works again; so it is when it has become long.
//
// The committer alone uses it.
type journal struct {
	path string
	warn func(msg string, args ...any)

	file *os.File // nil when it doesn't end where the database does
	last position
	size int64
	base int64 // size when it was written anew, or would have been at the start

	undoLast position // before the last append
	undoSize int64
	failures int // in a row
	wait     int // commits until it is tried again
}

// attach opens the journal if its last entry is the commit at which the database
// stands, all of whose records take about base bytes. Otherwise catchUp writes it
// anew.
func (j *journal) attach(at position, base int64) error {
	f, err := os.OpenFile(j.path, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open the journal: %w", err)
	}
	size, last, err := lastEntry(f)
	if err != nil || last.position != at || last.format != format {
		return f.Close() // what is wrong with it doesn't matter any more
	}
	j.file, j.last, j.size, j.base = f, at, size, base
	return nil
}

// append adds the entry of the commit p.
func (j *journal) append(p position, g *group) {
	if j.file == nil {
		return
	}
	if p.seq != j.last.seq+1 {
		j.fail(fmt.Errorf("commit %d doesn't follow its last one, %d", p.seq, j.last.seq))
		return
	}
	j.undoLast, j.undoSize = j.last, j.size
	data := g.encode(p)
	if _, err := j.file.WriteAt(data, j.size); err != nil {
		j.fail(err)
		return
	}
	j.last, j.size = p, j.size+int64(len(data))
}

// undo takes back the last append, whose commit failed.
func (j *journal) undo() {
	if j.file == nil || j.size == j.undoSize {
		return
	}
	j.last, j.size = j.undoLast, j.undoSize
	if err := j.file.Truncate(j.size); err != nil {
		j.fail(err)
	}
}

// catchUp writes the journal anew if it has ended, or if there is time for that and
// it has become long. bolt must not be written meanwhile.
func (j *journal) catchUp(bolt *bbolt.DB, leisure bool) {
	if j.file != nil && (!leisure || j.size <= 2*j.base+journalSlack) {
		return
	}
	if j.wait > 0 {
		j.wait--
		return
	}
	if err := guard(func() error { return bolt.View(j.rewrite) }); err != nil {
		j.postpone(err)
		return
	}
	if j.failures > 0 {
		j.warn("the journal is written again", "path", j.path)
	}
	j.failures = 0
}

// fail ends the journal at what it has.
func (j *journal) fail(err error) {
	// Half an entry at its end would do no harm. What a full disk lacks, it has.
	err = errors.Join(err, j.file.Truncate(j.size), j.file.Close())
	j.file = nil
	j.postpone(err)
}

// postpone has the journal written anew after some commits.
func (j *journal) postpone(err error) {
	if j.failures == 0 {
		j.warn("the journal can't be written and is tried again later; should the database be lost meanwhile, what is new goes with it", "path", j.path, "error", err)
	}
	j.wait = 1 << min(j.failures, 8)
	j.failures++
}

// rewrite makes a journal of all that tx sees.
func (j *journal) rewrite(tx *bbolt.Tx) (err error) {
	at, err := positionOf(tx)
	if err != nil {
		return err
	}
	fresh := j.path + ".new"
	f, err := os.OpenFile(fresh, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("write the journal anew: %w", errors.Join(err, f.Close(), os.Remove(fresh)))
		}
	}()
	size, err := dump(tx, at, f)
	if err != nil {
		return err
	}
	// In the background, and rarely: nobody waits for it.
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(fresh, j.path); err != nil {
		return err
	}
	if j.file != nil {
		j.file.Close() // it has no name any more
	}
	j.file, j.last, j.size, j.base = f, at, size, size
	return nil
}

// dump writes all records as entries of the commit at.
func dump(tx *bbolt.Tx, at position, f *os.File) (size int64, err error) {
	out := beginEntry(make([]byte, 0, chunk+chunk/8))
	flush := func() error {
		n, err := f.Write(endEntry(out, at))
		size, out = size+int64(n), beginEntry(out)
		return err
	}
	err = tx.ForEach(func(name []byte, b *bbolt.Bucket) error {
		if string(name) == metaBucket {
			return nil
		}
		return b.ForEach(func(k, v []byte) error {
			out = appendChange(out, name, k, entry{value: v})
			if len(out) < chunk {
				return nil
			}
			return flush()
		})
	})
	if err == nil {
		err = flush() // one at least: an empty database stands somewhere, too
	}
	return size, err
}

// check reads the whole journal. One that ends early, or not at all, is no
// problem, as the next commit or start writes it anew.
func (j *journal) check() error {
	r, err := replay(j.path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("check %s: %w", j.path, err)
	case r.entries > 0 && !r.complete():
		return fmt.Errorf("check %s: it is damaged in %d places; kilnd fsck --repair writes it anew", j.path, r.gaps)
	}
	return nil
}

func (j *journal) close() error {
	if j.file == nil {
		return nil
	}
	err := j.file.Close()
	j.file = nil
	return err
}
