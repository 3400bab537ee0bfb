package store

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.etcd.io/bbolt"
)

// Layout 2 had key.link, key.back and key.result. All else stays, and the sum of
// all records is right afterwards, also for a database that is rebuilt from a
// journal of that layout.
func TestKeysAreJoined(t *testing.T) {
	a, b, tag := strings.Repeat("a", 32), strings.Repeat("b", 32), strings.Repeat("t", 16)
	for _, lost := range []bool{false, true} {
		root := t.TempDir()
		path := filepath.Join(root, fileName)
		old := openAt(t, root, nil)
		batch := &Batch{}
		batch.Put("key.link", a+tag+b, nil)
		batch.Put("key.back", b+a+tag, nil)
		batch.Put("key.result", b+"record", []byte("whenmade"))
		batch.Put("key.of", "record\x00"+b, nil)
		old.Write(batch)
		mustSync(t, old)
		if err := old.Close(); err != nil {
			t.Fatal(err)
		}
		setLayout(t, path, func(tx *bbolt.Tx) error {
			at, err := positionOf(tx)
			return errors.Join(err, putLayout(tx, 2, at))
		})
		if _, err := Open(Options{Root: root, ReadOnly: true}); err == nil || !strings.Contains(err.Error(), "the next start of the daemon migrates it") {
			t.Errorf("Open, to read only = %v", err)
		}
		w := &warnings{}
		if lost { // the journal is of layout 2, too
			edit(t, filepath.Join(root, journalName), func(data []byte) []byte {
				for rest := data; len(rest) > 0; {
					_, payload, after, err := decodeEntry(rest)
					if err != nil {
						t.Fatal(err)
					}
					entry := rest[:entryHead+len(payload)+entryTail]
					entry[12] = 2
					fixChecksum(entry)
					rest = after
				}
				return data
			})
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
		d := openAt(t, root, w)
		if !strings.Contains(w.all(), "migrated") {
			t.Errorf("warned %q", w.all())
		}
		wantValue(t, d, "key", a+"l"+tag+b, "")
		wantValue(t, d, "key", b+"b"+a+tag, "")
		wantValue(t, d, "key", b+"r"+"record", "whenmade")
		wantValue(t, d, "key.of", "record\x00"+b, "")
		for _, bucket := range []string{"key.link", "key.back", "key.result"} {
			if got := scan(d, bucket, ""); got != "" {
				t.Errorf("%s still has %q", bucket, got)
			}
		}
		put(d, "x", "new", "v")
		mustSync(t, d)
		if err := errors.Join(d.Check(), d.Close()); err != nil {
			t.Error(err)
		}
		again := &warnings{}
		wantValue(t, openAt(t, root, again), "x", "new", "v")
		if again.all() != "" {
			t.Errorf("the next start warned %q", again.all())
		}
	}
}

// Layout 3 had names of images, too.
func TestImagesAreDropped(t *testing.T) {
	root := t.TempDir()
	old := openAt(t, root, nil)
	put(old, "image", "app", "{}")
	put(old, "ref", "a", "{}")
	mustSync(t, old)
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}
	setLayout(t, filepath.Join(root, fileName), func(tx *bbolt.Tx) error {
		at, err := positionOf(tx)
		return errors.Join(err, putLayout(tx, 3, at))
	})
	d := openAt(t, root, &warnings{})
	if got := scan(d, "image", ""); got != "" {
		t.Errorf("there are still images: %q", got)
	}
	wantValue(t, d, "ref", "a", "{}")
	if err := errors.Join(d.Check(), d.Close()); err != nil {
		t.Error(err)
	}
}
