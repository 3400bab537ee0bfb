package store

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func entryOf(at position, payload string) []byte {
	return endEntry(append(beginEntry(nil), payload...), at)
}

func fixChecksum(e []byte) {
	binary.LittleEndian.PutUint32(e[8:], crc32.Checksum(e[12:], crcTable))
}

// busy makes a database by many commits, with deletions and long values, and
// returns what is in it.
func busy(t *testing.T, root string, seed uint64) map[string]string {
	t.Helper()
	d, err := Open(Options{Root: root, Delay: manual})
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(seed, 1))
	want := map[string]string{}
	d.Scan("m", "", func(k string, v []byte) bool { want[k] = string(v); return true })
	for commit := range 30 {
		b := &Batch{}
		for range 40 {
			k := fmt.Sprintf("%04x", rnd.IntN(600))
			if rnd.IntN(4) == 0 {
				b.Delete("m", k)
				delete(want, k)
				continue
			}
			v := strings.Repeat(fmt.Sprint(commit, k), rnd.IntN(60))
			b.Put("m", k, []byte(v))
			want[k] = v
		}
		b.Put(fmt.Sprint("other", rnd.IntN(9)), "k", []byte("v"))
		d.Write(b)
		mustSync(t, d)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	return want
}

func TestDeletedDatabaseIsRebuilt(t *testing.T) {
	root := t.TempDir()
	want := busy(t, root, 1)
	for range 3 {
		if err := os.Remove(filepath.Join(root, fileName)); err != nil {
			t.Fatal(err)
		}
		w := &warnings{}
		d := openAt(t, root, w)
		if !strings.Contains(w.all(), "missing") || !strings.Contains(w.all(), "rebuilt from its journal ") {
			t.Errorf("warned %q", w.all())
		}
		compareModel(t, d, "", want)
		if !d.Unproven() {
			t.Error("the rebuilt database counts as proven")
		}
		if d.Partial() {
			t.Error("a database that was rebuilt as a whole counts as one that lacks records")
		}
		b := &Batch{}
		b.Proven()
		d.Write(b)
		mustSync(t, d)
		if err := d.Check(); err != nil {
			t.Error(err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		d = openAt(t, root, nil)
		if d.Unproven() {
			t.Error("it isn't proven for good")
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		want = busy(t, root, 2)
	}
}

// A daemon that dies between the journal and the database finds them apart.
func TestJournalThatIsNotTheDatabases(t *testing.T) {
	for name, spoil := range map[string]func([]byte) []byte{
		"ahead":   func(b []byte) []byte { return append(b, entryOf(position{99, 1}, "")...) },
		"behind":  func(b []byte) []byte { return b[:len(b)-100] },
		"torn":    func(b []byte) []byte { return append(b, entryOf(position{31, 1}, "xyz")[:33]...) },
		"gone":    func([]byte) []byte { return nil },
		"foreign": func(b []byte) []byte { fill8(b, 'x'); return b },
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			want := busy(t, root, 1)
			edit(t, filepath.Join(root, journalName), spoil)
			w := &warnings{}
			d := openAt(t, root, w)
			compareModel(t, d, "", want)
			if w.all() != "" {
				t.Errorf("warned %q", w.all())
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(filepath.Join(root, fileName)); err != nil {
				t.Fatal(err)
			}
			d = openAt(t, root, w)
			compareModel(t, d, "", want)
			if !strings.Contains(w.all(), "rebuilt from its journal ") || strings.Contains(w.all(), "in part") {
				t.Errorf("warned %q", w.all())
			}
		})
	}
}

// With both damaged, what single entries prove is kept.
func TestDamagedJournalIsReplayedInPart(t *testing.T) {
	root := t.TempDir()
	want := busy(t, root, 1)
	journal := filepath.Join(root, journalName)
	edit(t, journal, func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
	d := openAt(t, root, nil)
	if err := d.Check(); err == nil || !strings.Contains(err.Error(), "fsck --repair") {
		t.Errorf("Check = %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(root, fileName)); err != nil {
		t.Fatal(err)
	}
	w := &warnings{}
	d = openAt(t, root, w)
	if !d.Partial() {
		t.Error("a database that was rebuilt in part counts as whole")
	}
	if !strings.Contains(w.all(), "in part") {
		t.Errorf("warned %q", w.all())
	}
	right, n := 0, 0
	d.Scan("m", "", func(k string, v []byte) bool {
		n++
		if want[k] == string(v) {
			right++
		}
		return true
	})
	if n < len(want)*9/10 || right < len(want)*8/10 {
		t.Errorf("of %d records %d are back, %d as they were", len(want), n, right)
	}
	if err := d.Check(); err != nil {
		t.Error(err)
	}
}

func TestRepairJournal(t *testing.T) {
	root := t.TempDir()
	busy(t, root, 1)
	edit(t, filepath.Join(root, journalName), func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
	d := openAt(t, root, nil)
	if rewritten, err := d.RepairJournal(); err != nil || !rewritten {
		t.Fatal(rewritten, err)
	}
	if err := d.Check(); err != nil {
		t.Error(err)
	}
}

// The journal is written anew before it is much longer than what it tells.
func TestJournalStaysShort(t *testing.T) {
	root := t.TempDir()
	d := openAt(t, root, nil)
	value := strings.Repeat("v", 64<<10)
	for i := range 400 {
		put(d, "x", fmt.Sprint(i%10), value)
		mustSync(t, d)
	}
	st, err := os.Stat(filepath.Join(root, journalName))
	if err != nil {
		t.Fatal(err)
	}
	if limit := int64(2*10*len(value) + 2*journalSlack); st.Size() > limit {
		t.Errorf("the journal takes %d bytes, more than %d", st.Size(), limit)
	}
	if err := d.Check(); err != nil {
		t.Error(err)
	}
}

// Whoever waits for the end doesn't wait for a long journal as well; the next daemon
// makes it short.
func TestCloseLeavesALongJournal(t *testing.T) {
	root := t.TempDir()
	d, err := Open(Options{Root: root, Delay: manual})
	if err != nil {
		t.Fatal(err)
	}
	const records = journalSlack + 1<<20
	journal := func() int64 {
		st, err := os.Stat(filepath.Join(root, journalName))
		if err != nil {
			t.Fatal(err)
		}
		return st.Size()
	}
	put(d, "x", "a", strings.Repeat("1", records))
	mustSync(t, d) // and writes it anew
	put(d, "x", "a", strings.Repeat("2", records))
	mustSync(t, d)
	put(d, "x", "a", strings.Repeat("3", records))
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if got := journal(); got < 3*records {
		t.Errorf("Close left a journal of %d bytes, want the %d of all commits", got, 3*records)
	}
	d = openAt(t, root, nil)
	put(d, "x", "b", "1")
	mustSync(t, d)
	if got := journal(); got > records+journalSlack {
		t.Errorf("after the next commit the journal has %d bytes, want about %d", got, records)
	}
	wantValue(t, d, "x", "b", "1")
	if err := d.Check(); err != nil {
		t.Error(err)
	}
}

// A journal that can't be written fails no commit, and is there again when it
// can.
func TestJournalThatCannotBeWritten(t *testing.T) {
	root := t.TempDir()
	w := &warnings{}
	d := openAt(t, root, w)
	put(d, "x", "a", "1")
	mustSync(t, d)
	d.committing.Lock()
	if err := d.journal.file.Close(); err != nil {
		t.Fatal(err)
	}
	d.committing.Unlock()
	for i := range 3 {
		put(d, "x", fmt.Sprint("b", i), "2")
		mustSync(t, d)
	}
	if !strings.Contains(w.all(), "journal can't be written") || !strings.Contains(w.all(), "written again") {
		t.Errorf("warned %q", w.all())
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(root, fileName)); err != nil {
		t.Fatal(err)
	}
	d = openAt(t, root, nil)
	wantValue(t, d, "x", "a", "1")
	wantValue(t, d, "x", "b2", "2")
}
