package cache

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/kilnbuild/kiln/internal/store"
)

// bucketEvictions holds the journal: evictions by their number.
const bucketEvictions = "evicted"

const (
	// journalLength is how many evictions are remembered.
	journalLength = 10000
	// journalKeys is how many keys of a record are.
	journalKeys = 16
)

// Eviction is the end of a record that a key's result pointed at. It is written
// with the removal, in one batch.
type Eviction struct {
	Record      string
	Description string
	Type        RecordType
	Size        int64 // what it freed
	// Rule is PruneOptions.Rule, or "lost" with the reason if the record's files
	// turned out to be missing.
	Rule string
	At   time.Time
	Keys []string // cache keys that led to the record, in binary
}

// storedEviction is an Eviction as it is stored.
type storedEviction struct {
	Record string     `json:"r"`
	Desc   string     `json:"d,omitempty"`
	Type   RecordType `json:"t,omitempty"`
	Size   int64      `json:"z,omitempty"`
	Rule   string     `json:"u"`
	At     int64      `json:"c"`
	Keys   [][]byte   `json:"k,omitempty"`
}

// journal is a ring in the store. The zero value is ready.
type journal struct {
	length      int // 0 is journalLength
	loaded      bool
	first, next uint64 // numbers of the oldest eviction and of the next one
}

func evictionKey(number uint64) string { return fmt.Sprintf("%016x", number) }

// load finds out where the ring stands; only who evicts has to know.
func (j *journal) load(db *store.DB) {
	if j.loaded {
		return
	}
	j.loaded = true
	empty := true
	db.Scan(bucketEvictions, "", func(key string, _ []byte) bool {
		n, err := strconv.ParseUint(key, 16, 64)
		if err != nil {
			return true // nobody's; it takes part in nothing
		}
		if empty {
			j.first, empty = n, false
		}
		j.next = n + 1
		return true
	})
}

// add writes an eviction and forgets the oldest.
func (j *journal) add(db *store.DB, b *store.Batch, e storedEviction) error {
	j.load(db)
	value, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("encode the eviction of %s: %w", e.Record, err)
	}
	b.Note(bucketEvictions, evictionKey(j.next), value)
	j.next++
	length := uint64(journalLength)
	if j.length > 0 {
		length = uint64(j.length)
	}
	for ; j.next-j.first > length; j.first++ {
		b.Delete(bucketEvictions, evictionKey(j.first))
	}
	return nil
}

// writeEvictions adds to b, for the journal, why persisted records go. Those
// that somebody discarded go without. The caller holds m.writes.
func (m *Manager) writeEvictions(b *store.Batch, gone []*record, keys map[string][]string) {
	now := time.Now().UnixNano()
	for _, r := range gone {
		rule := r.rule
		if rule == "" && r.broken {
			rule = fmt.Sprintf("lost: %v", r.lost)
		}
		if rule == "" {
			continue
		}
		e := storedEviction{Record: r.id, Desc: r.opts.Description, Type: r.opts.Type, Size: r.freed, Rule: rule, At: now}
		for _, k := range keys[r.id] {
			if len(e.Keys) < journalKeys {
				e.Keys = append(e.Keys, []byte(k))
			}
		}
		if err := m.journal.add(m.db, b, e); err != nil {
			m.log.Error("remember eviction", "record", r.id, "error", err)
		}
		m.evictions.Add(1)
		m.evictedBytes.Add(r.freed)
	}
}

// Evictions calls fn for the evictions that are remembered, newest first, until
// it returns false.
func (m *Manager) Evictions(fn func(Eviction) bool) {
	var values [][]byte
	m.db.Scan(bucketEvictions, "", func(_ string, value []byte) bool {
		values = append(values, value)
		return true
	})
	for _, value := range slices.Backward(values) {
		var s storedEviction
		if err := json.Unmarshal(value, &s); err != nil {
			m.log.Error("eviction is unreadable, ignored it", "error", err)
			continue
		}
		e := Eviction{Record: s.Record, Description: s.Desc, Type: s.Type, Size: s.Size, Rule: s.Rule, At: time.Unix(0, s.At)}
		for _, k := range s.Keys {
			e.Keys = append(e.Keys, string(k))
		}
		if !fn(e) {
			return
		}
	}
}

// Evicted returns the latest eviction of each name that has one. A name is the
// id of a record, which is also that of a step's result, or a cache key in
// binary. One call for many names reads the journal once.
func (m *Manager) Evicted(names ...string) map[string]Eviction {
	wanted := make(map[string]bool, len(names))
	for _, n := range names {
		wanted[n] = true
	}
	found := map[string]Eviction{}
	m.Evictions(func(e Eviction) bool {
		for _, name := range append(e.Keys, e.Record) {
			if _, ok := found[name]; wanted[name] && !ok {
				found[name] = e
			}
		}
		return len(found) < len(wanted)
	})
	return found
}
