package build

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/control/record"
	"github.com/kilnbuild/kiln/solver/trace"
)

// What real builds are recorded to do replays: steps that ran, hits by
// definition and by content, an input that was lost.
func TestRecordedBuildsReplay(t *testing.T) {
	d := newDaemon(t)
	dir := filepath.Join(t.TempDir(), "recorded")
	rec, err := record.Open(dir, slog.New(slog.NewTextHandler(d.log, nil)))
	d.must(err)
	d.engine.cfg.Record = rec
	d.build("copy", "a", trouble{})
	d.build("copy", "a", trouble{})
	d.build("copy", "b", trouble{mounting: d.loseSnapshot("two")})

	files, err := filepath.Glob(filepath.Join(dir, "*"))
	d.must(err)
	if len(files) != 3 {
		t.Fatalf("%d builds left the recordings %q", 3, files)
	}
	for i, want := range [][]string{
		{`name="copy"`, `"run: no record"`, "execute sha256:"},
		{`"hit: by definition"`, "answer 1"},
		{`"run: the record is lost"`, "lost=0"},
	} {
		text, err := os.ReadFile(files[i])
		d.must(err)
		for _, s := range want {
			if !strings.Contains(string(text), s) {
				t.Errorf("recording %d says nothing of %s:\n%s", i, s, text)
			}
		}
		played, err := trace.Play(string(text))
		if err != nil {
			t.Fatalf("replay recording %d: %v\n%s", i, err, text)
		}
		if played != string(text) {
			t.Errorf("recording %d:\n%s\nreplayed:\n%s", i, text, played)
		}
	}
}
