package store

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.etcd.io/bbolt"
)

const filledRecords = 3000

// filled makes a database with some records and closes it.
func filled(t *testing.T) (root, path string) {
	t.Helper()
	root = t.TempDir()
	d, err := Open(Options{Root: root, Delay: manual})
	if err != nil {
		t.Fatal(err)
	}
	for i := range filledRecords {
		put(d, "x", fmt.Sprintf("key-%05d", i), strings.Repeat("v", 100))
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	return root, filepath.Join(root, fileName)
}

func edit(t *testing.T, path string, fn func([]byte) []byte) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, fn(data), 0o600); err != nil {
		t.Fatal(err)
	}
}

func fill8(b []byte, v byte) {
	for i := range b {
		b[i] = v
	}
}

var damages = map[string]func([]byte) []byte{
	"foreign bytes":  func([]byte) []byte { return bytes.Repeat([]byte("not a database. "), 4096) },
	"empty":          func([]byte) []byte { return nil },
	"very short":     func([]byte) []byte { return []byte("x") },
	"one page":       func(b []byte) []byte { return b[:4096] },
	"meta pages":     func(b []byte) []byte { clear(b[:8192]); return b },
	"one meta page":  func(b []byte) []byte { clear(b[4096:8192]); return b },
	"cut in half":    func(b []byte) []byte { return b[:len(b)/2/4096*4096] },
	"zeroed pages":   func(b []byte) []byte { clear(b[8192:]); return b },
	"garbage pages":  func(b []byte) []byte { fill8(b[8192:], 0xa5); return b },
	"one value":      func(b []byte) []byte { return bytes.Replace(b, []byte("vvvv"), []byte("vvwv"), 1) },
	"no version":     func(b []byte) []byte { return bytes.ReplaceAll(b, []byte(metaBucket), []byte(".other")) },
	"newer by a bit": func(b []byte) []byte { return bytes.ReplaceAll(b, []byte("format4"), []byte("format7")) },
	"senseless text": func(b []byte) []byte { return bytes.ReplaceAll(b, []byte("format4"), []byte("formatx")) },
}

func TestDamagedFilesAreSetAsideAndRebuilt(t *testing.T) {
	for name, damage := range damages {
		for _, journal := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, journal %t", name, journal), func(t *testing.T) {
				root, path := filled(t)
				edit(t, path, damage)
				if !journal {
					if err := os.Remove(filepath.Join(root, journalName)); err != nil {
						t.Fatal(err)
					}
				}
				before, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				w := &warnings{}
				d := openAt(t, root, w)
				want, told := 0, "everything that was cached is lost"
				if journal {
					want, told = filledRecords, "rebuilt from its journal "
				}
				if !strings.Contains(w.all(), "set aside") || !strings.Contains(w.all(), told) {
					t.Errorf("warned %q", w.all())
				}
				if got := strings.Count(scan(d, "x", ""), "key-"); got != want {
					t.Errorf("the new database holds %d records", got)
				}
				if d.Unproven() != journal {
					t.Errorf("unproven %t", d.Unproven())
				}
				aside, err := filepath.Glob(path + ".damaged-*")
				if err != nil || len(aside) != 1 {
					t.Fatalf("set aside: %v, %v", aside, err)
				}
				if after, err := os.ReadFile(aside[0]); err != nil || !bytes.Equal(before, after) {
					t.Errorf("the file set aside isn't the damaged one: %v", err)
				}
				put(d, "x", "k", "v")
				mustSync(t, d)
				if err := d.Check(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// A page that goes bad while the daemon runs doesn't stop it: the reader finds
// nothing, and the next start sees to it.
func TestDamageWhileOpen(t *testing.T) {
	root, path := filled(t)
	var leaf int64
	bolt, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := bolt.View(func(tx *bbolt.Tx) error {
		for i := 2; ; i++ {
			info, err := tx.Page(i)
			if err != nil || info == nil {
				return fmt.Errorf("page %d: %v, %v", i, info, err)
			}
			if info.Type == "leaf" && info.Count > 10 {
				leaf = int64(i) * 4096
				return nil
			}
		}
	}); err != nil {
		t.Fatal(err)
	}
	if err := bolt.Close(); err != nil {
		t.Fatal(err)
	}

	w := &warnings{}
	d := openAt(t, root, w)
	edit(t, path, func(b []byte) []byte { fill8(b[leaf:leaf+4096], 0xff); return b })
	if got := scan(d, "x", ""); got != "" {
		t.Errorf("scan over a damaged page: %.100q", got)
	}
	if !strings.Contains(w.all(), "can't be read") {
		t.Errorf("warned %q", w.all())
	}
	if err := d.Check(); err == nil {
		t.Error("Check finds nothing wrong")
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	w = &warnings{}
	d = openAt(t, root, w)
	if !strings.Contains(w.all(), "set aside") {
		t.Errorf("the next start warned %q", w.all())
	}
	if got := strings.Count(scan(d, "x", ""), "key-"); got != filledRecords {
		t.Errorf("%d records were rebuilt", got)
	}
}

// setLayout changes the layout's version of a closed database.
func setLayout(t *testing.T, path string, change func(tx *bbolt.Tx) error) {
	t.Helper()
	bolt, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := bolt.Update(change); err != nil {
		t.Fatal(err)
	}
	if err := bolt.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestNewerLayoutIsRefused(t *testing.T) {
	root, path := filled(t)
	setLayout(t, path, func(tx *bbolt.Tx) error { return putLayout(tx, format+1, position{}) })
	for _, readOnly := range []bool{false, true} {
		_, err := Open(Options{Root: root, ReadOnly: readOnly})
		if err == nil || !strings.Contains(err.Error(), "a newer kiln wrote it") {
			t.Errorf("Open = %v", err)
		}
		if _, err := os.Stat(path); err != nil {
			t.Errorf("the file was touched: %v", err)
		}
	}
}

// A journal of a newer layout isn't rebuilt from.
func TestNewerJournalIsRefused(t *testing.T) {
	root, path := filled(t)
	e := entryOf(position{7, 0}, "")
	e[12] = format + 1
	fixChecksum(e)
	journal := filepath.Join(root, journalName)
	edit(t, journal, func(b []byte) []byte { return append(b, e...) })
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Options{Root: root}); err == nil || !strings.Contains(err.Error(), "a newer kiln wrote it") {
		t.Errorf("Open = %v", err)
	}
}

// Layout 1 had no position, no check of its version, and no journal.
func TestMigration(t *testing.T) {
	root, path := filled(t)
	setLayout(t, path, func(tx *bbolt.Tx) error {
		if err := tx.DeleteBucket([]byte(metaBucket)); err != nil {
			return err
		}
		b, err := tx.CreateBucket([]byte(metaBucket))
		if err != nil {
			return err
		}
		return b.Put([]byte(formatKey), []byte("1"))
	})
	if err := os.Remove(filepath.Join(root, journalName)); err != nil {
		t.Fatal(err)
	}
	w := &warnings{}
	d := openAt(t, root, w)
	if !strings.Contains(w.all(), "migrated") {
		t.Errorf("warned %q", w.all())
	}
	if got := strings.Count(scan(d, "x", ""), "key-"); got != filledRecords {
		t.Errorf("%d records", got)
	}
	put(d, "x", "new", "v")
	mustSync(t, d)
	if err := d.Check(); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	// The journal can stand in for it now.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	wantValue(t, openAt(t, root, nil), "x", "new", "v")
}

// A file that was made and never written is no damage.
func TestFileWithoutLayout(t *testing.T) {
	root := t.TempDir()
	setLayout(t, filepath.Join(root, fileName), func(*bbolt.Tx) error { return nil })
	w := &warnings{}
	d := openAt(t, root, w)
	if w.all() != "" {
		t.Errorf("warned %q", w.all())
	}
	put(d, "x", "k", "v")
	mustSync(t, d)
	if err := d.Check(); err != nil {
		t.Error(err)
	}
}

func TestSecondDaemonIsTold(t *testing.T) {
	root := t.TempDir()
	d := openAt(t, root, nil)
	for _, readOnly := range []bool{false, true} {
		_, err := Open(Options{Root: root, ReadOnly: readOnly})
		if err == nil || !strings.Contains(err.Error(), "in use by another daemon") {
			t.Fatalf("Open = %v", err)
		}
	}
	put(d, "x", "k", "v")
	mustSync(t, d)
}

func TestOpenWithoutRoot(t *testing.T) {
	if _, err := Open(Options{Root: filepath.Join(t.TempDir(), "none")}); err == nil {
		t.Error("opened a root that isn't there")
	}
}

// A database that is only looked at stays as it is.
func TestReadOnly(t *testing.T) {
	root, path := filled(t)
	before := snapshotDir(t, root)
	d, err := Open(Options{Root: root, ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	b := &Batch{}
	b.Put("x", "new", []byte("v"))
	b.OnDurable(func() { t.Error("a batch of a read-only database was called durable") })
	d.Write(b)
	mustSync(t, d)
	wantValue(t, d, "x", "new", "v")
	wantValue(t, d, "x", "key-00007", strings.Repeat("v", 100))
	if err := d.Check(); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if after := snapshotDir(t, root); after != before {
		t.Error("files were changed")
	}
	edit(t, path, damages["one value"])
	if _, err := Open(Options{Root: root, ReadOnly: true}); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("Open = %v", err)
	}
	if found, err := filepath.Glob(path + ".*"); err != nil || len(found) > 0 {
		t.Errorf("made %v, %v", found, err)
	}
}

// snapshotDir is the content of all files in dir.
func snapshotDir(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&out, "%s %q\n", e.Name(), data)
	}
	return out.String()
}

// bbolt's locks are held for good after a panic in a write; nothing may hang on
// them.
func TestPanicInsideACommit(t *testing.T) {
	root, path := filled(t)
	w := &warnings{}
	d := openAt(t, root, w)
	// The branch pages of the open file turn to garbage under bbolt.
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	garbage := make([]byte, 1<<20)
	fill8(garbage, 0xff)
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(garbage[:min(int64(len(garbage)), st.Size()-8192)], 8192); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		put(d, "x", "key-00001", "new")
		if err := d.Sync(t.Context()); err == nil {
			t.Fatal("a commit into garbage succeeded")
		}
		wantValue(t, d, "x", "key-00001", "new")
	}
	if !d.broken.Load() || !strings.Contains(w.all(), "restart the daemon") {
		t.Errorf("broken %v, warned %q", d.broken.Load(), w.all())
	}
	if err := d.Close(); err == nil {
		t.Error("Close says that all was written")
	}
}

func TestCreatesNothingWhenIdle(t *testing.T) {
	root := t.TempDir()
	d := openAt(t, root, nil)
	if err := d.Verify(t.Context()); err != nil { // by then the journal is there
		t.Fatal(err)
	}
	before := snapshotDir(t, root)
	d.Write(&Batch{})
	mustSync(t, d)
	if after := snapshotDir(t, root); after != before {
		t.Error("an empty batch was committed")
	}
}
