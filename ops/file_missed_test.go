package ops

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/cache/cachetest"
	"github.com/kilnbuild/kiln/cache/contenthash"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
)

// What was removed from an input, or written to it, since that was made is
// noticed by the copy of it, though its content was digested before and isn't read
// again: the input is made again.
func TestCopyNoticesChangedInput(t *testing.T) {
	file, dir := fileTestCopy(-1, 0, 0, "/d/f", "/x"), fileTestCopy(-1, 0, 0, "/d", "/x")
	tests := map[string]struct {
		change func(d string) error // the directory d in the lower of two layers
		copy   *pb.FileAction
		lost   bool
	}{
		"nothing":               {func(string) error { return nil }, dir, false},
		"file removed":          {func(d string) error { return os.Remove(d + "/f") }, file, true},
		"file of directory":     {func(d string) error { return os.Remove(d + "/f") }, dir, true},
		"deep in directory":     {func(d string) error { return os.Remove(d + "/sub/g") }, dir, true},
		"added":                 {func(d string) error { return os.WriteFile(d+"/new", nil, 0o644) }, dir, true},
		"file written":          {func(d string) error { return os.WriteFile(d+"/f", []byte("other"), 0o644) }, file, true},
		"written in directory":  {func(d string) error { return os.WriteFile(d+"/sub/g", []byte("other"), 0o644) }, dir, true},
		"elsewhere":             {func(d string) error { return os.Remove(d + "/sub/g") }, file, false},
		"linked from elsewhere": {func(d string) error { return os.Link(d+"/f", d+"/../../../link") }, dir, false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			m := cachetest.Open(t, root).Manager
			low := fileTestRef(t, m, "d d\nd/f - 644 0:0 f\nd/sub d\nd/sub/g - 644 0:0 g", nil)
			defer low.Release()
			input := newRef(t, m, low, fileSet{"high": "h"})
			defer input.Release()
			if _, err := contenthash.Checksum(t.Context(), input, "/d", contenthash.Options{}); err != nil {
				t.Fatal(err)
			}
			found, err := filepath.Glob(filepath.Join(root, "snapshots", "*", "fs", "d"))
			if err != nil || len(found) != 1 {
				t.Fatalf("the directory is %q, %v", found, err)
			}
			tickOfFiles(t)
			if err := tt.change(found[0]); err != nil {
				t.Fatal(err)
			}
			out, err := fileTestOp(t, m, 1, tt.copy).Exec(t.Context(), nil, results(input))
			for _, r := range out {
				r.Release()
			}
			var lost *solver.LostError
			if errors.As(err, &lost) != tt.lost || tt.lost != errors.Is(err, cache.ErrLost) || !tt.lost && err != nil {
				t.Errorf("%d outputs, error %v", len(out), err)
			}
			if tt.lost && input.Lost() == nil {
				t.Error("the record is still in use")
			}
		})
	}
}

// tickOfFiles waits, for some milliseconds at most, until what is written now has a
// later time than what was written before.
func tickOfFiles(t *testing.T) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tick")
	for start := time.Now(); ; {
		write(t, path, "tick")
		if st, err := os.Stat(path); err != nil {
			t.Fatal(err)
		} else if st.ModTime().After(start) {
			return
		}
	}
}
