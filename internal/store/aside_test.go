package store

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Of the databases that were set aside only the newest is kept, and that one
// for a time; what a user renamed is the user's.
func TestAsides(t *testing.T) {
	now := time.Now().UTC()
	days := func(n int) string { return asidePrefix + now.AddDate(0, 0, -n).Format(asideTime) }
	for _, tt := range []struct {
		name          string
		before, after []string
		told          string
	}{
		{name: "none"},
		{name: "one", before: []string{days(29)}, after: []string{days(29)}},
		{name: "an old one", before: []string{days(31)}, told: "older than 30 days"},
		{name: "several", before: []string{days(3), days(1), days(2)}, after: []string{days(1)}, told: "there is a newer one"},
		{name: "several old ones", before: []string{days(40), days(50)}, told: "older than 30 days"},
		{name: "somebody else's", before: []string{asidePrefix + "keep", days(1)}, after: []string{days(1), asidePrefix + "keep"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root, path := filled(t)
			for _, name := range tt.before {
				if err := os.WriteFile(filepath.Join(root, name), make([]byte, 10_000), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			w := &warnings{}
			d := openAt(t, root, w)
			if got := asideNames(t, path); strings.Join(got, " ") != strings.Join(tt.after, " ") {
				t.Errorf("left %q, want %q", got, tt.after)
			}
			if !strings.Contains(w.all(), tt.told) {
				t.Errorf("told %q", w.all())
			}
			plain := blocks(t, path) + blocks(t, filepath.Join(root, journalName))
			for _, name := range tt.after {
				if _, ours := setAsideAt(name); ours {
					plain += blocks(t, filepath.Join(root, name))
				}
			}
			if size, _, _, err := d.Size(); err != nil || size != plain {
				t.Errorf("size %d, want %d: %v", size, plain, err)
			}
		})
	}
}

// A database that is damaged again and again leaves one file.
func TestDamagedAgainAndAgain(t *testing.T) {
	root, path := filled(t)
	for range 3 {
		edit(t, path, damages["one value"])
		if err := openAt(t, root, &warnings{}).Close(); err != nil {
			t.Fatal(err)
		}
		if got := asideNames(t, path); len(got) != 1 {
			t.Errorf("set aside: %q", got)
		}
	}
}

// blocks is what a file takes on disk.
func blocks(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func asideNames(t *testing.T, path string) (names []string) {
	t.Helper()
	found, err := filepath.Glob(path + ".damaged-*")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range found {
		names = append(names, filepath.Base(f))
	}
	return names
}
