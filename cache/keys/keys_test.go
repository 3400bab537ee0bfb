package keys

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/solver"
	"github.com/kilnbuild/kiln/solver/keygraph"
	"github.com/opencontainers/go-digest"
)

type result string

func (r result) ID() string           { return string(r) }
func (r result) Clone() solver.Result { return r }
func (r result) Release()             {}

func openDB(t testing.TB, root string) *store.DB {
	t.Helper()
	db, err := store.Open(store.Options{Root: root, Delay: time.Millisecond, Warn: func(msg string, args ...any) {
		t.Errorf("the store warns: %s %v", msg, args)
	}})
	if err != nil {
		t.Fatal(err)
	}
	return db
}

func key(i int) solver.Key { return solver.RootKey(digest.FromString(fmt.Sprint(i)), 0) }

// entries counts what the database holds of the graph.
func entries(db *store.DB) (n int) {
	for _, of := range []kind{links, backs, results, byID} {
		eachOf(db, of, "", func(string, []byte) bool {
			n++
			return true
		})
	}
	return n
}

func check(t *testing.T, s *Store) {
	t.Helper()
	if _, problems := s.Check(func(string) bool { return true }); len(problems) > 0 {
		t.Fatalf("check finds:\n%s", strings.Join(problems, "\n"))
	}
}

// model drives the store and keygraph.Memory with the same random changes.
type model struct {
	t    *testing.T
	r    *rand.Rand
	db   *store.DB
	s    *Store
	m    *keygraph.Memory
	next int
	live []string
	past []solver.Lookup
}

// save saves a result, or with none links, on random keys. Keys repeat, so that
// the graph has cycles and keys with many results.
func (m *model) save(withResult bool) {
	s := solver.Save{Lookup: solver.Lookup{Op: digest.Digest(fmt.Sprint("op", m.r.IntN(3))), Output: m.r.IntN(2)}}
	for range 1 + m.r.IntN(2) {
		s.Keys = append(s.Keys, key(m.r.IntN(12)))
	}
	for range m.r.IntN(3) {
		var candidates []solver.InputKey
		for range 1 + m.r.IntN(2) {
			candidates = append(candidates, solver.InputKey{Key: key(m.r.IntN(12)), Selector: digest.Digest([]string{"", "x"}[m.r.IntN(2)])})
		}
		s.Inputs = append(s.Inputs, candidates)
	}
	if len(s.Inputs) == 0 {
		s.Roots = s.Keys
	}
	if withResult {
		m.next++
		// Ids that are the beginning of others, and look like the layout's own.
		id := strings.Repeat("a", m.r.IntN(2)) + []string{"\x00", "", "ß/", "\xff"}[m.r.IntN(4)] + fmt.Sprint(m.next)
		if len(m.live) > 0 && m.r.IntN(4) == 0 {
			id = m.live[m.r.IntN(len(m.live))] + strings.Repeat("\x00", m.r.IntN(40))
		}
		if !slices.Contains(m.live, id) {
			m.live = append(m.live, id)
		}
		s.Result = result(id)
	}
	for _, store := range []solver.KeyStore{m.s, m.m} {
		if err := store.Save(s); err != nil {
			m.t.Fatal(err)
		}
	}
	m.past = append(m.past, s.Lookup)
}

func (m *model) drop(n int) {
	m.r.Shuffle(len(m.live), func(i, j int) { m.live[i], m.live[j] = m.live[j], m.live[i] })
	n = min(n, len(m.live))
	for _, store := range []solver.KeyStore{m.s, m.m} {
		if err := store.Drop(m.live[:n]); err != nil {
			m.t.Fatal(err)
		}
	}
	m.live = m.live[n:]
}

func (m *model) reopen(root string) {
	if err := m.db.Close(); err != nil {
		m.t.Fatal(err)
	}
	m.db = openDB(m.t, root)
	m.s = Open(m.db)
}

// compare looks everything up again in both.
func (m *model) compare() {
	m.t.Helper()
	for _, l := range m.past {
		got, err := m.s.Lookup(l)
		if err != nil {
			m.t.Fatal(err)
		}
		want, err := m.m.Lookup(l)
		if err != nil {
			m.t.Fatal(err)
		}
		if g, w := describe(got), describe(want); g != w {
			m.t.Fatalf("lookup %v:\ngot  %s\nwant %s", l, g, w)
		}
	}
	check(m.t, m.s)
}

func describe(f solver.Found) string {
	var keys, records []string
	for _, k := range f.Keys {
		keys = append(keys, k.String())
	}
	for _, r := range f.Records {
		records = append(records, fmt.Sprintf("%q", r.Result))
	}
	slices.Sort(keys)
	slices.Sort(records) // times differ between the stores
	return fmt.Sprint(keys, f.Matched, records)
}

// The store is what keygraph.Memory is, across restarts, and holds nothing
// once all results are gone. compat: LLB-170, LLB-171, LLB-172
func TestLikeMemory(t *testing.T) {
	for round := range 40 {
		seed := uint64(time.Now().UnixNano())
		t.Run(fmt.Sprint(round), func(t *testing.T) {
			t.Logf("seed %d", seed)
			root := t.TempDir()
			m := &model{t: t, r: rand.New(rand.NewPCG(seed, 1)), db: openDB(t, root), m: keygraph.NewMemory()}
			m.s = Open(m.db)
			for range 60 {
				switch m.r.IntN(8) {
				case 0:
					m.drop(1 + m.r.IntN(4))
				case 1:
					m.save(false)
				case 2:
					if m.r.IntN(10) == 0 {
						m.reopen(root)
					}
				default:
					m.save(true)
				}
				m.compare()
			}
			m.drop(len(m.live))
			m.compare()
			if n := entries(m.db); n != 0 {
				t.Errorf("%d entries are left of an empty graph", n)
			}
			if err := m.db.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// The newest of several results comes first, also after a restart.
// compat: LLB-173
func TestNewestFirst(t *testing.T) {
	root := t.TempDir()
	db := openDB(t, root)
	s := Open(db)
	l := solver.Lookup{Op: "op", Roots: []solver.Key{key(1)}}
	for _, id := range []string{"b", "c", "a", "b"} { // b again, which makes it the newest
		if err := s.Save(solver.Save{Lookup: l, Keys: l.Roots, Result: result(id)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	db = openDB(t, root)
	defer db.Close()
	found, err := Open(db).Lookup(l)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, r := range found.Records {
		got = append(got, r.Result)
	}
	if !slices.Equal(got, []string{"b", "a", "c"}) {
		t.Errorf("records %v, want b a c", got)
	}
}

// chain saves results that hang off a -> b -> c.
func chain(t *testing.T, s *Store, ids ...string) {
	t.Helper()
	for i, id := range ids {
		v := solver.Save{Lookup: solver.Lookup{Op: "op"}, Keys: []solver.Key{key(i)}, Result: result(id)}
		if i > 0 {
			v.Inputs = [][]solver.InputKey{{{Key: key(i - 1)}}}
		}
		if err := s.Save(v); err != nil {
			t.Fatal(err)
		}
	}
}

// Batches that were filled and aren't written yet count as written: two of
// them, neither of which alone empties a key, leave nothing behind.
func TestForgetTwiceBeforeWriting(t *testing.T) {
	db := openDB(t, t.TempDir())
	defer db.Close()
	s := Open(db)
	chain(t, s, "base", "one")
	chain(t, s, "base", "two")
	var a, b store.Batch
	s.Forget(&a, []string{"one"})
	s.Forget(&b, []string{"two", "one"})
	db.Write(&b)
	db.Write(&a)
	if err := db.Sync(context.Background()); err != nil {
		t.Fatal(err)
	}
	check(t, s)
	if c, _ := s.Check(func(string) bool { return true }); c != (Counts{Results: 1}) {
		t.Errorf("what is left: %+v, want the one result of the base", c)
	}
	if len(s.removing)+len(s.again) != 0 {
		t.Errorf("still remembered: %d removed, %d saved", len(s.removing), len(s.again))
	}
}

// What is saved between Forget and the writing of its batch stays, and is there at
// every moment: no commit is waited for.
func TestSaveBetweenForgetAndWrite(t *testing.T) {
	db, err := store.Open(store.Options{Root: t.TempDir(), Delay: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	s := Open(db)
	chain(t, s, "base", "old")
	var b store.Batch
	s.Forget(&b, []string{"old", "base"})
	chain(t, s, "base", "new")
	db.Write(&b)
	found, err := s.Lookup(solver.Lookup{Op: "op", Inputs: [][]solver.InputKey{{{Key: key(0)}}}})
	if err != nil || len(found.Records) != 1 || found.Records[0].Result != "new" {
		t.Errorf("found %v, %v; want the new result", found.Records, err)
	}
	check(t, s)
}

// persisted is a result that writes itself.
type persisted struct {
	result
	err error
}

func (p persisted) Persist(b *store.Batch) error {
	b.Put("thing", p.ID(), []byte("data"))
	return p.err
}

// The result and what leads to it are one batch: both are there, or neither.
func TestSavePersistsTheResult(t *testing.T) {
	root := t.TempDir()
	db := openDB(t, root)
	s := Open(db)
	l := solver.Lookup{Op: "op", Roots: []solver.Key{key(1)}}
	if err := s.Save(solver.Save{Lookup: l, Keys: l.Roots, Result: persisted{result: "good"}}); err != nil {
		t.Fatal(err)
	}
	cause := errors.New("no more space")
	if err := s.Save(solver.Save{Lookup: l, Keys: l.Roots, Result: persisted{"bad", cause}}); !errors.Is(err, cause) {
		t.Errorf("save of a result that can't be persisted: %v", err)
	}
	if err := s.Save(solver.Save{Lookup: l, Keys: l.Roots, Result: result(strings.Repeat("x", maxID+1))}); err == nil {
		t.Error("a result whose name doesn't fit was saved")
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	db = openDB(t, root)
	defer db.Close()
	s = Open(db)
	_, problems := s.Check(func(id string) bool {
		_, ok := db.Get("thing", id)
		return ok
	})
	if len(problems) > 0 {
		t.Errorf("check finds %v", problems)
	}
	if found, _ := s.Lookup(l); len(found.Records) != 1 || found.Records[0].Result != "good" {
		t.Errorf("found %v", found.Records)
	}
	if _, ok := db.Get("thing", "bad"); ok {
		t.Error("the result that failed was stored")
	}
}

// A hit that brings nothing new writes nothing.
func TestLinkAgainWritesNothing(t *testing.T) {
	db := openDB(t, t.TempDir())
	defer db.Close()
	s := Open(db)
	chain(t, s, "base", "one")
	again := solver.Save{Lookup: solver.Lookup{Op: "op", Inputs: [][]solver.InputKey{{{Key: key(0)}}}}, Keys: []solver.Key{key(1), key(7)}}
	var b store.Batch
	if s.link(&b, again) {
		t.Error("links that exist, or lead nowhere, are written")
	}
}

// Check finds what is damaged.
func TestCheckFindsDamage(t *testing.T) {
	for of, want := range map[kind]string{
		links: "known only at its end", backs: "not known at its end",
		results: "known only by id", byID: "not known by id",
	} {
		t.Run(fmt.Sprintf("%q", of), func(t *testing.T) {
			db := openDB(t, t.TempDir())
			defer db.Close()
			s := Open(db)
			chain(t, s, "base", "one")
			var b store.Batch
			eachOf(db, of, "", func(k string, _ []byte) bool {
				drop(&b, entry{of, k})
				return true
			})
			db.Write(&b)
			if _, problems := s.Check(func(string) bool { return true }); !strings.Contains(strings.Join(problems, "\n"), want) {
				t.Errorf("check finds %q, want %q", problems, want)
			}
		})
	}
	db := openDB(t, t.TempDir())
	defer db.Close()
	s := Open(db)
	chain(t, s, "base")
	if _, problems := s.Check(func(string) bool { return false }); len(problems) != 1 {
		t.Errorf("check of a result that doesn't exist finds %q", problems)
	}
}

func FuzzIDs(f *testing.F) {
	f.Add("a", "a\x00")
	f.Add("", "\x00")
	f.Add("\xff", strings.Repeat("\x00", 33))
	f.Add("a", "a\x00"+strings.Repeat("k", 32))
	f.Fuzz(func(t *testing.T, a, b string) {
		if a == b || len(a) > maxID || len(b) > maxID {
			return
		}
		db := openDB(t, t.TempDir())
		defer db.Close()
		s := Open(db)
		chain(t, s, a, b)
		if err := s.Drop([]string{a}); err != nil {
			t.Fatal(err)
		}
		found, err := s.Lookup(solver.Lookup{Op: "op", Inputs: [][]solver.InputKey{{{Key: key(0)}}}})
		if err != nil || len(found.Records) != 1 || found.Records[0].Result != b {
			t.Fatalf("without %q, found %v, %v; want %q", a, found.Records, err, b)
		}
		check(t, s)
		if err := s.Drop([]string{b}); err != nil {
			t.Fatal(err)
		}
		if n := entries(db); n != 0 {
			t.Fatalf("%d entries are left", n)
		}
	})
}
