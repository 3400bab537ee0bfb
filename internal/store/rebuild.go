package store

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"go.etcd.io/bbolt"
)

// replayed is what the journal tells.
type replayed struct {
	content map[string]map[string][]byte
	last    position // of the last entry
	at      position // where the content stands; it is last if nothing is missing
	format  int
	entries int
	gaps    int  // stretches between entries that aren't any
	torn    bool // there is something after the last entry
}

// replay reads the journal. What is damaged in it is left out. An entry of a
// newer layout is an error.
func replay(path string) (*replayed, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the journal: %w", err)
	}
	r := &replayed{content: map[string]map[string][]byte{}}
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
	r.at = r.position()
	return r, nil
}

func (r *replayed) apply(info entryInfo, payload []byte) error {
	if err := changes(payload, func(_, _, _ []byte, _ bool) {}); err != nil {
		return err
	}
	r.entries, r.last, r.format = r.entries+1, info.position, info.format
	return changes(payload, func(bucket, key, value []byte, deleted bool) {
		b := r.content[string(bucket)]
		if b == nil {
			b = map[string][]byte{}
			r.content[string(bucket)] = b
		}
		if deleted {
			delete(b, string(key))
		} else {
			b[string(key)] = value
		}
	})
}

// position adds up the content.
func (r *replayed) position() position {
	p := position{seq: r.last.seq}
	for name, records := range r.content {
		h := hashBucket(name)
		for k, v := range records {
			p.sum += h.record([]byte(k), v)
		}
	}
	return p
}

// complete says whether the content is all there was at the last entry.
func (r *replayed) complete() bool { return r.gaps == 0 && r.at == r.last }

// bytes are those of all keys and values; there may be no r.
func (r *replayed) bytes() (n int) {
	if r == nil {
		return 0
	}
	for _, b := range r.content {
		for k, v := range b {
			n += len(k) + len(v)
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
	bolt, err := bbolt.Open(fresh, 0o600, &bbolt.Options{NoSync: true, FreelistType: bbolt.FreelistMapType, InitialMmapSize: 2 * r.bytes()})
	if err != nil {
		return fmt.Errorf("make a database: %w", err)
	}
	err = bolt.Update(func(tx *bbolt.Tx) error { return fill(tx, r) })
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

// fill puts the records, if any, into an empty database.
func fill(tx *bbolt.Tx, r *replayed) error {
	if r == nil {
		return putLayout(tx, format, position{})
	}
	for _, name := range sortedKeys(r.content) {
		b, err := tx.CreateBucketIfNotExists([]byte(name))
		if err != nil {
			return err
		}
		b.FillPercent = 0.9 // keys come in order
		for _, key := range sortedKeys(r.content[name]) {
			if err := b.Put([]byte(key), r.content[name][key]); err != nil {
				return fmt.Errorf("key %q of bucket %s: %w", key, name, err)
			}
		}
	}
	if err := putLayout(tx, max(r.format, formatWithSum), r.at); err != nil {
		return err
	}
	return tx.Bucket([]byte(metaBucket)).Put([]byte(unprovenKey), []byte{1})
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
