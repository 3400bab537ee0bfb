package store

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"

	"go.etcd.io/bbolt"
)

// replayed is what the journal tells.
type replayed struct {
	histories map[string]*history // by bucket
	content   map[string][]told   // records by bucket, in the order of their keys
	last      position            // of the last entry
	at        position            // where the content stands; it is last if nothing is missing
	format    int
	entries   int
	gaps      int  // stretches between entries that aren't any
	torn      bool // there is something after the last entry
}

// replay reads the journal. What is damaged in it is left out. An entry of a
// newer layout is an error.
func replay(path string) (*replayed, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the journal: %w", err)
	}
	r := &replayed{histories: map[string]*history{}, content: map[string][]told{}}
	for len(data) > 0 {
		info, payload, rest, err := decodeEntry(data)
		if err == nil {
			if info.format > format {
				return nil, fmt.Errorf("the journal %s: %w", path, newerError(info.format))
			}
			err = r.apply(info, payload)
		}
		if err == nil {
			data = rest
			continue
		}
		if data = nextEntry(data); data != nil {
			r.gaps++
		} else {
			r.torn = true
		}
	}
	for bucket, h := range r.histories {
		r.content[bucket] = h.records()
	}
	r.histories = nil
	r.at = r.position()
	return r, nil
}

// apply adds what an entry tells, all of it or nothing.
func (r *replayed) apply(info entryInfo, payload []byte) error {
	runs, err := runsOf(payload)
	if err != nil {
		return err
	}
	r.entries, r.last, r.format = r.entries+1, info.position, info.format
	for _, run := range runs {
		h := r.histories[run.bucket]
		if h == nil {
			h = &history{}
			r.histories[run.bucket] = h
		}
		h.add(run.told)
	}
	return nil
}

// position adds up the content, on all cores.
func (r *replayed) position() position {
	var sum atomic.Uint64
	var wg sync.WaitGroup
	for bucket, records := range r.content {
		h := hashBucket(bucket)
		for part := range slices.Chunk(records, len(records)/runtime.GOMAXPROCS(0)+1) {
			wg.Go(func() {
				s := uint64(0)
				for _, t := range part {
					s += h.record(t.key, t.value)
				}
				sum.Add(s)
			})
		}
	}
	wg.Wait()
	return position{r.last.seq, sum.Load()}
}

// complete says whether the content is all there was at the last entry.
func (r *replayed) complete() bool { return r.gaps == 0 && r.at == r.last }

// bytes are those of all keys and values; there may be no r.
func (r *replayed) bytes() (n int) {
	if r == nil {
		return 0
	}
	for _, records := range r.content {
		for _, t := range records {
			n += len(t.key) + len(t.value)
		}
	}
	return n
}

func (r *replayed) records() (n int) {
	for _, b := range r.content {
		n += len(b)
	}
	return n
}

// rebuild makes a database of what the journal tells, and reports that. Without
// a journal there is nothing to make one of, and the database is an empty one.
func (d *DB) rebuild(why string) error {
	r, err := replay(d.journal.path)
	if errors.Is(err, os.ErrNotExist) {
		d.warn(why+"; there is no journal to rebuild it from, so everything that was cached is lost", "path", d.path)
		return d.create(nil)
	}
	if err != nil {
		return err
	}
	args := []any{"path", d.path, "records", r.records(), "commit", r.last.seq}
	switch {
	case r.records() == 0:
		d.warn(why+"; its journal tells of no records, so everything that was cached is lost", args...)
	case r.complete():
		d.warn(why+"; it was rebuilt from its journal", args...)
	default:
		d.warn(why+"; it was rebuilt from its journal, which is damaged too, in part", append(args, "gaps", r.gaps)...)
	}
	return d.create(r)
}

// create puts a database with what was replayed, or an empty one, in place.
//
// One that was replayed isn't synced, which would take as long as all the rest of
// the start: should it get lost, or come out torn, before the first commit syncs
// it, the next start replays the journal again. That has all of it at any time.
func (d *DB) create(r *replayed) error {
	fresh := d.path + ".new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("make a database: %w", err)
	}
	// Mapped as large as it becomes: to map it anew as it grows is most of the work.
	bolt, err := bbolt.Open(fresh, 0o600, &bbolt.Options{NoSync: true, NoGrowSync: true, FreelistType: bbolt.FreelistMapType, InitialMmapSize: 2 * r.bytes()})
	if err != nil {
		return fmt.Errorf("make a database: %w", err)
	}
	err = fill(bolt, r)
	if err == nil && r == nil {
		err = bolt.Sync()
	}
	if err = errors.Join(err, bolt.Close()); err == nil {
		err = os.Rename(fresh, d.path)
	}
	if err != nil {
		return fmt.Errorf("make a database: %w", err)
	}
	return nil
}

// fillAtOnce is how many records one transaction puts into a new database. In one
// alone they would all be in one node, where the place of each has to be found.
const fillAtOnce = 2048

// fill puts the records, if any, into an empty database that nobody reads before it
// has all of them.
func fill(bolt *bbolt.DB, r *replayed) error {
	if r == nil {
		return bolt.Update(func(tx *bbolt.Tx) error { return putLayout(tx, format, position{}) })
	}
	for _, bucket := range sortedKeys(r.content) {
		if err := bolt.Update(func(tx *bbolt.Tx) error {
			_, err := tx.CreateBucketIfNotExists([]byte(bucket))
			return err
		}); err != nil {
			return err
		}
		for part := range slices.Chunk(r.content[bucket], fillAtOnce) {
			if err := bolt.Update(func(tx *bbolt.Tx) error { return fillPart(tx.Bucket([]byte(bucket)), bucket, part) }); err != nil {
				return err
			}
		}
	}
	return bolt.Update(func(tx *bbolt.Tx) error {
		if err := putLayout(tx, max(r.format, formatWithSum), r.at); err != nil {
			return err
		}
		state := unprovenPart
		if r.complete() {
			state = unprovenWhole
		}
		return tx.Bucket([]byte(metaBucket)).Put([]byte(unprovenKey), []byte(state))
	})
}

func fillPart(b *bbolt.Bucket, bucket string, part []told) error {
	b.FillPercent = 0.9 // keys come in order
	for _, t := range part {
		if err := b.Put(t.key, t.value); err != nil {
			return fmt.Errorf("key %q of bucket %s: %w", t.key, bucket, err)
		}
	}
	return nil
}

// putLayout stores the layout's version and where the database stands.
func putLayout(tx *bbolt.Tx, version int, at position) error {
	b, err := tx.CreateBucketIfNotExists([]byte(metaBucket))
	if err != nil {
		return err
	}
	text := strconv.Itoa(version)
	return errors.Join(
		b.Put([]byte(formatKey), []byte(text)),
		b.Put([]byte(formatCheckKey), []byte(formatCheck(text))),
		b.Put([]byte(positionKey), at.encode()),
	)
}

func positionOf(tx *bbolt.Tx) (position, error) {
	b := tx.Bucket([]byte(metaBucket))
	if b == nil {
		return position{}, damagedf("the layout's version is missing")
	}
	return decodePosition(b.Get([]byte(positionKey)))
}
