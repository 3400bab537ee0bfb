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

// filled makes a database with some records and closes it.
func filled(t *testing.T) (root, path string) {
	t.Helper()
	root = t.TempDir()
	d, err := Open(Options{Root: root, Delay: manual})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3000 {
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

func TestDamagedFilesAreSetAside(t *testing.T) {
	for name, damage := range map[string]func([]byte) []byte{
		"foreign bytes":  func([]byte) []byte { return bytes.Repeat([]byte("not a database. "), 4096) },
		"very short":     func([]byte) []byte { return []byte("x") },
		"one page":       func(b []byte) []byte { return b[:4096] },
		"meta pages":     func(b []byte) []byte { clear(b[:8192]); return b },
		"cut in half":    func(b []byte) []byte { return b[:len(b)/2/4096*4096] },
		"zeroed pages":   func(b []byte) []byte { clear(b[8192:]); return b },
		"garbage pages":  func(b []byte) []byte { fill(b[8192:], 0xa5); return b },
		"no version":     func(b []byte) []byte { return bytes.ReplaceAll(b, []byte(metaBucket), []byte(".other")) },
		"senseless text": func(b []byte) []byte { return bytes.ReplaceAll(b, []byte("format1"), []byte("formatx")) },
	} {
		t.Run(name, func(t *testing.T) {
			root, path := filled(t)
			edit(t, path, damage)
			before, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			w := &warnings{}
			d := openAt(t, root, w)
			if !strings.Contains(w.all(), "set aside") {
				t.Errorf("warned %q", w.all())
			}
			if got := scan(d, "x", ""); got != "" {
				t.Errorf("the new database holds %.100q", got)
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
		})
	}
}

func fill(b []byte, v byte) {
	for i := range b {
		b[i] = v
	}
}

// A page that only some reader visits doesn't stop the daemon: the reader finds
// nothing, and the next start examines the whole file.
func TestDamageFoundLaterIsExaminedAtTheNextStart(t *testing.T) {
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
	edit(t, path, func(b []byte) []byte { fill(b[leaf:leaf+4096], 0xff); return b })

	w := &warnings{}
	d := openAt(t, root, w)
	if got := scan(d, "x", ""); got != "" {
		t.Errorf("scan over a damaged page: %.100q", got)
	}
	if !strings.Contains(w.all(), "can't be read") || strings.Contains(w.all(), "set aside and") {
		t.Errorf("warned %q", w.all())
	}
	if err := d.Check(); err == nil {
		t.Error("Check finds nothing wrong")
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	w = &warnings{}
	openAt(t, root, w)
	if !strings.Contains(w.all(), "set aside") {
		t.Errorf("the next start warned %q", w.all())
	}
	if _, err := os.Lstat(filepath.Join(root, suspectName)); !os.IsNotExist(err) {
		t.Errorf("the mark is still there: %v", err)
	}
}

func TestNewerLayoutIsRefused(t *testing.T) {
	root, path := filled(t)
	bolt, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := bolt.Update(func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte(metaBucket)).Put([]byte(formatKey), fmt.Append(nil, format+1))
	}); err != nil {
		t.Fatal(err)
	}
	if err := bolt.Close(); err != nil {
		t.Fatal(err)
	}
	for _, suspect := range []bool{false, true} {
		if suspect {
			if err := os.WriteFile(filepath.Join(root, suspectName), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		_, err = Open(Options{Root: root})
		if err == nil || !strings.Contains(err.Error(), "a newer kiln wrote it") {
			t.Errorf("Open = %v", err)
		}
		if _, err := os.Stat(path); err != nil {
			t.Errorf("the file was touched: %v", err)
		}
	}
}

func TestSecondDaemonIsTold(t *testing.T) {
	root := t.TempDir()
	d := openAt(t, root, nil)
	_, err := Open(Options{Root: root})
	if err == nil || !strings.Contains(err.Error(), "in use by another daemon") {
		t.Fatalf("Open = %v", err)
	}
	put(d, "x", "k", "v")
	mustSync(t, d)
}

func TestOpenWithoutRoot(t *testing.T) {
	if _, err := Open(Options{Root: filepath.Join(t.TempDir(), "none")}); err == nil {
		t.Error("opened a root that isn't there")
	}
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
	fill(garbage, 0xff)
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
	before, err := os.ReadFile(filepath.Join(root, fileName))
	if err != nil {
		t.Fatal(err)
	}
	d.Write(&Batch{})
	mustSync(t, d)
	after, err := os.ReadFile(filepath.Join(root, fileName))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(before, after) {
		t.Error("an empty batch was committed")
	}
}
