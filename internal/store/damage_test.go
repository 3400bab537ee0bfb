package store

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var damageRounds = flag.Int("damage.rounds", 200, "random damages to the database")

// Whatever happens to the file, the database opens and holds what it held: either
// the damage hit nothing that counts, or it is seen, told, and made good from the
// journal.
func TestRandomDamage(t *testing.T) {
	source := t.TempDir()
	want := busy(t, source, 3)
	rnd := rand.New(rand.NewPCG(11, 5))
	seen := map[bool]int{}
	for round := range *damageRounds {
		root := t.TempDir()
		copyFiles(t, source, root)
		what := spoil(t, rnd, filepath.Join(root, fileName))
		w := &warnings{}
		d := openAt(t, root, w)
		compareModel(t, d, "", want)
		told := strings.Contains(w.all(), "rebuilt from its journal ")
		if !told && w.all() != "" {
			t.Errorf("round %d, %s: warned %q", round, what, w.all())
		}
		seen[told]++
		put(d, "m", "new", "value")
		if err := errors.Join(d.Close(), checkFile(root)); err != nil {
			t.Errorf("round %d, %s: %v", round, what, err)
		}
		if t.Failed() {
			t.Fatalf("round %d: %s", round, what)
		}
	}
	t.Logf("%d damages were seen, %d hit nothing that counts", seen[true], seen[false])
	if seen[true] < *damageRounds/3 {
		t.Errorf("only %d of %d damages were seen", seen[true], *damageRounds)
	}
}

// With the journal damaged as well, the database opens, and what is in it was
// in it once.
func TestRandomDamageOfBoth(t *testing.T) {
	source := t.TempDir()
	busy(t, source, 3)
	ever := map[string]bool{}
	r, err := replayAll(filepath.Join(source, journalName), ever)
	if err != nil || r == 0 {
		t.Fatal(r, err)
	}
	rnd := rand.New(rand.NewPCG(12, 5))
	for round := range *damageRounds / 2 {
		root := t.TempDir()
		copyFiles(t, source, root)
		what := spoil(t, rnd, filepath.Join(root, fileName)) + " and " + spoil(t, rnd, filepath.Join(root, journalName))
		d := openAt(t, root, &warnings{})
		d.Scan("m", "", func(k string, v []byte) bool {
			if !ever[k+"="+string(v)] {
				t.Errorf("round %d, %s: %s=%.20s never was", round, what, k, v)
			}
			return !t.Failed()
		})
		put(d, "m", "new", "value")
		_, err := d.RepairJournal()
		if err := errors.Join(err, d.Close(), checkFile(root)); err != nil {
			t.Errorf("round %d, %s: %v", round, what, err)
		}
		if t.Failed() {
			return
		}
	}
}

// checkFile looks at a closed database.
func checkFile(root string) error {
	d, err := Open(Options{Root: root, ReadOnly: true})
	if err != nil {
		return err
	}
	if _, ok := d.Get("m", "new"); !ok {
		err = errors.New("the new record isn't there")
	}
	return errors.Join(err, d.Check(), d.Close())
}

func replayAll(path string, ever map[string]bool) (entries int, err error) {
	data, err := os.ReadFile(path)
	for err == nil && len(data) > 0 {
		var payload []byte
		if _, payload, data, err = decodeEntry(data); err == nil {
			entries++
			err = changes(payload, func(_, key, value []byte, _ bool) { ever[string(key)+"="+string(value)] = true })
		}
	}
	return entries, err
}

func copyFiles(t *testing.T, from, to string) {
	t.Helper()
	for _, name := range []string{fileName, journalName} {
		data, err := os.ReadFile(filepath.Join(from, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(to, name), data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// spoil damages the file in some way and says in which.
func spoil(t *testing.T, rnd *rand.Rand, path string) (what string) {
	t.Helper()
	edit(t, path, func(b []byte) []byte {
		at := rnd.IntN(len(b))
		switch rnd.IntN(10) {
		case 0:
			what = fmt.Sprintf("cut at %d of %d", at, len(b))
			return b[:at]
		case 1:
			what = fmt.Sprintf("cut at page %d", at/4096)
			return b[:at/4096*4096]
		case 2:
			what = fmt.Sprintf("page %d zeroed", at/4096)
			clear(b[at/4096*4096 : min(len(b), at/4096*4096+4096)])
		case 3:
			from := rnd.IntN(len(b)) / 4096 * 4096
			what = fmt.Sprintf("page %d written to %d", from/4096, at/4096)
			copy(b[at/4096*4096:], bytes.Clone(b[from:min(len(b), from+4096)]))
		case 4, 5: // heads of pages are where it hurts
			at = at/4096*4096 + rnd.IntN(min(64, len(b)-at/4096*4096))
			fallthrough
		default:
			n := 1 + rnd.IntN(3)
			what = fmt.Sprintf("%d bits flipped from byte %d on", n, at)
			for i := range n {
				b[min(len(b)-1, at+i*rnd.IntN(50))] ^= 1 << rnd.IntN(8)
			}
		}
		return b
	})
	return what
}

// Bits all over a small database.
func TestBits(t *testing.T) {
	root := t.TempDir()
	d, err := Open(Options{Root: root, Delay: manual})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{}
	for i := range 40 {
		k := fmt.Sprint("key", i)
		want[k] = strings.Repeat(k, 20)
		put(d, "m", k, want[k])
	}
	put(d, "inline", "k", "v")
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(root, fileName)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	good, err := inspect(path)
	if err != nil {
		t.Fatal(err)
	}
	const step = 29 // all bits of a byte in turn
	passed := 0
	for bit := 0; bit < len(whole)*8; bit += step {
		whole[bit/8] ^= 1 << (bit % 8)
		found, err := inspectData(whole)
		if err != nil {
			if !errors.Is(err, errDamaged) || strings.Contains(err.Error(), "reading it") {
				t.Fatalf("bit %d: %v", bit, err)
			}
		} else if passed++; found != good {
			t.Fatalf("bit %d: found %+v, want %+v", bit, found, good)
		} else if passed%100 == 0 {
			sameRecords(t, path, whole, want)
		}
		whole[bit/8] ^= 1 << (bit % 8)
	}
	if passed == 0 || passed > len(whole)*8/step*98/100 {
		t.Errorf("%d bits of %d make no difference", passed, len(whole)*8/step)
	}
}

// sameRecords reads, with bbolt, a file that passed.
func sameRecords(t *testing.T, path string, data []byte, want map[string]string) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	bolt, err := openBolt(path, true)
	if err != nil {
		t.Fatal(err)
	}
	d := &DB{bolt: bolt, current: newGroup(), warn: func(msg string, args ...any) { t.Error(msg, args) }}
	got := map[string]string{}
	d.Scan("m", "", func(k string, v []byte) bool { got[k] = string(v); return true })
	for k := range want {
		wantValue(t, d, "m", k, want[k])
	}
	if err := bolt.Close(); err != nil {
		t.Fatal(err)
	}
	if !maps.Equal(got, want) {
		t.Fatal("the damage passes and changes what is read")
	}
}

// The inspector says of any bytes whether they are a database, and nothing else
// happens.
func FuzzInspect(f *testing.F) {
	root := f.TempDir()
	d, err := Open(Options{Root: root, Delay: manual})
	if err != nil {
		f.Fatal(err)
	}
	put(d, "m", "k", "v")
	if err := d.Close(); err != nil {
		f.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(root, fileName))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		if _, err := inspectData(data); err != nil && strings.Contains(err.Error(), "reading it") {
			t.Error(err)
		}
	})
}
