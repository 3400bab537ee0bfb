package cache

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/internal/store"
)

func (e *env) evictions() (out []Eviction) {
	e.m.Evictions(func(ev Eviction) bool {
		out = append(out, ev)
		return true
	})
	return out
}

// What a rule evicts can be found by the record and by the keys that led to it,
// also after a crash.
func TestJournal(t *testing.T) {
	e := newEnv(t)
	start := time.Now()
	a := e.aged(nil, "a", 8, start, 1, Options{})
	b := e.aged(nil, "b", 1, start, 1, Options{Type: TypeInternal})
	hook := func(_ *store.Batch, ids []string) map[string][]string {
		keys := map[string][]string{}
		for _, id := range ids {
			keys[id] = []string{"key of " + id, "\x00\xff" + id}
		}
		return keys
	}
	e.m.OnRemove(hook)
	u := get(e.m.New(t.Context(), nil, Options{Retain: true, Description: "discarded"}))(t)
	must(t, u.Discard(t.Context()))
	e.layer(nil, Options{Description: "never stored"}, "x=1").Release()
	must(t, e.m.Prune(t.Context(), PruneOptions{Rule: "rule one"}, nil))
	must(t, e.m.Prune(t.Context(), PruneOptions{All: true, Rule: "rule two"}, nil))
	for range 2 {
		got := e.evictions()
		if len(got) != 2 || got[0].Record != b || got[1].Record != a {
			t.Fatalf("journal %+v", got)
		}
		ev := got[1]
		if ev.Description != "a" || ev.Type != TypeRegular || ev.Rule != "rule one" || ev.Size < 8<<10 || ev.At.Before(start) || ev.At.After(time.Now()) ||
			!slices.Equal(ev.Keys, []string{"key of " + a, "\x00\xff" + a}) {
			t.Errorf("%+v", ev)
		}
		found := e.m.Evicted(a, "\x00\xff"+b, "nobody")
		if len(found) != 2 || found[a].Record != a || found["\x00\xff"+b].Rule != "rule two" {
			t.Errorf("found %+v", found)
		}
		for _, id := range []string{a, b} {
			if !strings.Contains(e.logged(), "record="+id) {
				t.Errorf("nothing was logged about %s", id)
			}
		}
		e.crash()
	}
}

// The journal is a ring, which goes on after a restart.
func TestJournalIsBounded(t *testing.T) {
	e := newEnv(t)
	number := 0
	evict := func(n int) {
		t.Helper()
		for range n {
			e.aged(nil, fmt.Sprint(number), 0, time.Unix(int64(number), 0), 1, Options{})
			number++
		}
		must(t, e.m.Prune(t.Context(), PruneOptions{Rule: "r"}, nil))
	}
	names := func() (out []string) {
		for _, ev := range e.evictions() {
			out = append(out, ev.Description)
		}
		return out
	}
	for range 3 {
		e.m.journal.length = 5
		evict(2)
		e.restart()
	}
	if got := names(); !slices.Equal(got, []string{"5", "4", "3", "2", "1"}) {
		t.Errorf("journal %q", got)
	}
	e.m.journal.length = 3
	evict(7)
	if got := names(); !slices.Equal(got, []string{"12", "11", "10"}) {
		t.Errorf("journal %q", got)
	}
}

// Records whose files are missing are in the journal, whoever finds out.
func TestJournalOfTheLost(t *testing.T) {
	e := newEnv(t)
	ids := map[string]string{}
	for _, name := range []string{"used", "opened"} {
		ids[name] = e.aged(nil, name, 1, time.Now(), 1, Options{})
	}
	e.m.mu.Lock()
	snap := e.m.records[ids["used"]].snap
	opened := e.m.records[ids["opened"]].snap
	e.m.mu.Unlock()
	must(t, os.RemoveAll(filepath.Join(e.root, "snapshots", snap)))
	r := get(e.m.Get(t.Context(), ids["used"]))(t)
	if _, err := r.Mounts(t.Context()); err == nil {
		t.Error("mounted what isn't there")
	}
	r.Release()
	batch := &store.Batch{}
	batch.Delete("snapshot", opened)
	e.db.Write(batch)
	e.crash()
	found := e.m.Evicted(ids["used"], ids["opened"])
	for name, id := range ids {
		if ev := found[id]; ev.Description != name || !strings.HasPrefix(ev.Rule, "lost: ") {
			t.Errorf("%s: %+v", name, ev)
		}
	}
}
