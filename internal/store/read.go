package store

import (
	"bytes"
	"strings"

	"go.etcd.io/bbolt"
)

// pair is one record a Scan found.
type pair struct {
	key     string
	value   []byte
	deleted bool
}

// Scan calls fn for every key of bucket that starts with prefix, in order,
// until it returns false. fn may call Write but sees the state as of the call
// of Scan.
//
// It copies what it finds before it calls fn: a bbolt transaction kept open
// meanwhile would block commits that grow the file, and with them any fn that
// reads.
func (d *DB) Scan(bucket, prefix string, fn func(key string, value []byte) bool) {
	var found []pair
	d.Read(func(r *Reader) { found = r.collect(bucket, prefix) })
	each(found, fn)
}

func each(found []pair, fn func(key string, value []byte) bool) {
	for _, p := range found {
		if !p.deleted && !fn(p.key, p.value) {
			return
		}
	}
}

// Reader looks many things up for the price of one transaction. It sees what was
// written before Read was called; of what is written meanwhile it may see a part.
type Reader struct {
	db      *DB
	groups  [2]*group // what wasn't in bbolt when the transaction began, oldest first
	tx      *bbolt.Tx // nil if the file can't be read
	cursors map[string]*bbolt.Cursor
}

// Read calls fn with a Reader, which is good until fn returns. fn must be quick
// and wait for nothing: a commit that grows the file waits for it.
func (d *DB) Read(fn func(r *Reader)) {
	r := &Reader{db: d, cursors: map[string]*bbolt.Cursor{}}
	for !r.begin() {
	}
	if r.tx != nil {
		defer r.tx.Rollback() // of a transaction that only reads; it can't fail
	}
	fn(r)
}

// begin begins the transaction, and reports whether the groups are still those of
// before: else a commit may have gone in between, and r would see a part of it.
//
// DB.mu isn't held meanwhile: a transaction begins after a commit that grows the
// file, which waits for readers, and they for DB.mu.
func (r *Reader) begin() bool {
	r.groups = r.db.pending()
	err := r.db.attempt(func() (err error) {
		r.tx, err = r.db.bolt.Begin(false)
		return err
	})
	if err != nil {
		r.tx = nil
		return true
	}
	if r.groups == r.db.pending() {
		return true
	}
	r.tx.Rollback()
	return false
}

// pending are the groups that aren't in bbolt, oldest first. One that is in flight
// may be there already, which makes no difference.
func (d *DB) pending() [2]*group {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return [2]*group{d.flying, d.current}
}

// Scan is DB.Scan.
func (r *Reader) Scan(bucket, prefix string, fn func(key string, value []byte) bool) {
	each(r.collect(bucket, prefix), fn)
}

// collect returns the records that match, in order, and such that are deleted.
func (r *Reader) collect(bucket, prefix string) []pair {
	r.db.mu.Lock() // not RLock: looking for a range puts a group's keys in order
	pending := merge(r.groups[0].scan(bucket, prefix), r.groups[1].scan(bucket, prefix))
	r.db.mu.Unlock()
	return merge(r.stored(bucket, prefix), pending)
}

// stored returns the matching records of bbolt.
func (r *Reader) stored(bucket, prefix string) (found []pair) {
	if r.tx == nil {
		return nil
	}
	err := r.db.attempt(func() error {
		c := r.cursor(bucket)
		if c == nil {
			return nil
		}
		start := []byte(prefix)
		for k, v := c.Seek(start); k != nil && bytes.HasPrefix(k, start); k, v = c.Next() {
			// bbolt's memory is valid during the transaction only.
			found = append(found, pair{key: string(k), value: append(make([]byte, 0, len(v)), v...)})
		}
		return nil
	})
	if err != nil {
		return nil
	}
	return found
}

// cursor returns the bucket's, nil if there is no such bucket.
func (r *Reader) cursor(bucket string) *bbolt.Cursor {
	c, known := r.cursors[bucket]
	if !known {
		if b := r.tx.Bucket([]byte(bucket)); b != nil {
			c = b.Cursor()
		}
		r.cursors[bucket] = c
	}
	return c
}

// merge returns the union of two ordered lists; above wins.
func merge(below, above []pair) []pair {
	switch {
	case len(above) == 0:
		return below
	case len(below) == 0:
		return above
	}
	out := make([]pair, 0, len(below)+len(above))
	for len(below) > 0 && len(above) > 0 {
		switch c := strings.Compare(below[0].key, above[0].key); {
		case c < 0:
			out, below = append(out, below[0]), below[1:]
		case c > 0:
			out, above = append(out, above[0]), above[1:]
		default:
			below = below[1:]
		}
	}
	return append(append(out, below...), above...)
}
