package snapshot_test

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/snapshot"
	"golang.org/x/sys/unix"
)

// What was changed since it was committed is seen by who packs it and by who
// asks; what looks like a change and is none isn't.
func TestChanged(t *testing.T) {
	later := func(path string) error { // as a build may set it
		return os.Chtimes(path, time.Time{}, time.Now().Add(time.Hour))
	}
	tests := map[string]struct {
		change func(dir string) error // in the lower layer, after the commit
		dir    string                 // in which, or
		file   string                 // which is found changed
	}{
		"nothing":               {change: func(string) error { return nil }},
		"deleted":               {change: func(dir string) error { return os.Remove(dir + "/d/a") }, dir: "d"},
		"added":                 {change: func(dir string) error { return os.WriteFile(dir+"/d/new", nil, 0o644) }, dir: "d"},
		"truncated":             {change: func(dir string) error { return os.Truncate(dir+"/d/a", 1) }, file: "d/a"},
		"written":               {change: func(dir string) error { return os.WriteFile(dir+"/d/a", []byte("A"), 0o644) }, file: "d/a"},
		"linked":                {change: func(dir string) error { return os.Link(dir+"/d/a", filepath.Dir(dir)+"/elsewhere") }},
		"mode changed":          {change: func(dir string) error { return os.Chmod(dir+"/d/a", 0o600) }},
		"set to a time to come": {change: func(dir string) error { return later(dir + "/d/a") }},
		"in the root":           {change: func(dir string) error { return os.Remove(dir + "/top") }, dir: "."},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			o := newOverlay(t)
			makeLayer(t, o, "low", "", func(dir string) {
				writeFile(t, dir+"/d/a", "a")
				writeFile(t, dir+"/top", "a")
			})
			makeLayer(t, o, "high", "low", func(dir string) { writeFile(t, dir+"/d/b", "b") })
			dir := layerDir(o, "low")
			tick(t)
			must(t, tt.change(dir))
			err := snapshot.WriteDiff(t.Context(), o, "low", io.Discard)
			var changed *snapshot.ChangedError
			if found := errors.As(err, &changed); found != (tt.dir+tt.file != "") || found && changed.ID != "low" {
				t.Errorf("packed: %v", err)
			}
			must(t, snapshot.WriteDiff(t.Context(), o, "high", io.Discard))

			w, err := snapshot.OpenWitness(o, "high")
			must(t, err)
			defer w.Close()
			for _, d := range []string{".", "d", "none"} {
				if err := w.Dir(d); (err != nil) != (d == tt.dir) {
					t.Errorf("directory %s: %v", d, err)
				}
			}
			for _, f := range []string{"d/a", "d/b"} {
				var st unix.Stat_t
				layer := map[string]string{"d/a": dir, "d/b": layerDir(o, "high")}[f]
				if err := unix.Lstat(layer+"/"+f, &st); err != nil {
					continue
				}
				if err := w.File(f, &st); (err != nil) != (f == tt.file) {
					t.Errorf("file %s: %v", f, err)
				}
				if err := w.Read(f, &st); (err != nil) != (f == tt.file) {
					t.Errorf("reading file %s: %v", f, err)
				}
			}
			for d, layer := range map[string]string{".": layerDir(o, "high"), "d": dir} {
				var st unix.Stat_t
				must(t, unix.Lstat(layer+"/"+d, &st))
				if err := w.Read(d, &st); (err != nil) != (d == tt.dir && d != ".") {
					t.Errorf("reading directory %s: %v", d, err) // the lower root is below another
				}
			}
		})
	}
}

// What is reopened and changed by its owner is what is committed then.
func TestReopenedIsNotChanged(t *testing.T) {
	o := newOverlay(t)
	makeLayer(t, o, "a", "", func(dir string) { writeFile(t, dir+"/x", "1") })
	must(t, o.Reopen(t.Context(), "a"))
	tick(t)
	writeFile(t, layerDir(o, "a")+"/y", "2")
	must(t, o.Commit(t.Context(), "a"))
	must(t, snapshot.WriteDiff(t.Context(), o, "a", io.Discard))
}

// tick waits, for some milliseconds at most, until what is written now has a
// later time than what was written before.
func tick(t *testing.T) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tick")
	for start := time.Now(); ; {
		must(t, os.WriteFile(path, []byte("tick"), 0o600))
		st, err := os.Stat(path)
		must(t, err)
		if st.ModTime().After(start) {
			return
		}
	}
}
