package record

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/solver"
	"github.com/kilnbuild/kiln/solver/trace"
)

func open(t *testing.T) (*Recorder, *bytes.Buffer) {
	t.Helper()
	log := &bytes.Buffer{}
	r, err := Open(filepath.Join(t.TempDir(), "some", "where"), slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	return r, log
}

// files are the recordings, oldest first, with what is in them.
func files(t *testing.T, r *Recorder) (names, texts []string) {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(r.dir, "*"+suffix))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range paths {
		text, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		names, texts = append(names, filepath.Base(p)), append(texts, string(text))
	}
	return names, texts
}

// run records a build in which a vertex of that name can't say what it is.
func run(rec *Recording, name, failure string) {
	core := solver.NewCore()
	step := func(ev solver.Event) []solver.Effect {
		effects := slices.Clone(core.Step(ev))
		rec.Trace(ev, effects)
		return effects
	}
	v := &solver.Vertex{Digest: "sha256:1", Name: name}
	effects := step(&solver.Requested{Call: 1, Edge: solver.Edge{Vertex: v}})
	ask := effects[len(effects)-1].(*solver.GetCacheMap)
	step(&solver.GotCacheMap{GetCacheMap: ask, Err: errors.New(failure)})
}

// A recording has no credentials in it, whatever stands in names and errors, and
// replays nevertheless.
func TestRecordingIsClean(t *testing.T) {
	r, log := open(t)
	rec := r.Begin("../a ref/" + strings.Repeat("x", 200))
	run(rec, `RUN "curl https://me:hunter2@host/p?token=hunter2#f \"https://h/?k=hunter2\"" # a@b`, "get https://hunter2@host/x?sig=hunter2&more=hunter2: no")
	rec.Close()
	names, texts := files(t, r)
	if len(names) != 1 || strings.ContainsAny(names[0], "/ ") || len(names[0]) > 150 {
		t.Fatalf("files %q", names)
	}
	if info, err := os.Stat(filepath.Join(r.dir, names[0])); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	text := texts[0]
	for _, want := range []string{"https://-@host/p?-#f", `https://h/?-`, "get https://-@host/x?- no", "# a@b", "answer 1"} {
		if !strings.Contains(text, want) {
			t.Errorf("the recording doesn't have %s:\n%s", want, text)
		}
	}
	if strings.Contains(text, "hunter2") {
		t.Errorf("the recording has a password in it:\n%s", text)
	}
	if played, err := trace.Play(text); err != nil || played != text {
		t.Errorf("replayed: %v\n%s\nrecorded:\n%s", err, played, text)
	}
	if log.Len() > 0 {
		t.Errorf("logged: %s", log)
	}
}

// Recordings are bounded, in number and in size, and a cut one replays.
func TestRecordingsAreBounded(t *testing.T) {
	r, _ := open(t)
	other := filepath.Join(r.dir, "0-notes.txt")
	if err := os.WriteFile(other, []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	for i := range MaxFiles + 3 {
		rec := r.Begin(fmt.Sprintf("build%d", i))
		run(rec, "a", "b")
		rec.Close()
	}
	names, _ := files(t, r)
	if len(names) != MaxFiles || !strings.HasSuffix(names[0], "-build3"+suffix) {
		t.Errorf("%d recordings are left, the first %s", len(names), names[0])
	}
	if _, err := os.Stat(other); err != nil {
		t.Errorf("a file that is no recording: %v", err)
	}

	if r.max != 16<<20 {
		t.Errorf("a recording may have %d bytes", r.max)
	}
	r.max = 2000
	rec := r.Begin("large")
	run(rec, "small", "failure")
	run(rec, strings.Repeat("x", 2000), "never seen")
	run(rec, "small", "never seen")
	rec.Close()
	_, texts := files(t, r)
	text := texts[len(texts)-1]
	if len(text) > 2000 || !strings.Contains(text, "failure") || !strings.HasSuffix(text, "# Cut off: a recording has at most 2000 bytes.\n") || strings.Contains(text, "never") {
		t.Errorf("%d bytes: %s", len(text), text[:min(len(text), 2000)])
	}
	if _, err := trace.Play(text); err != nil {
		t.Errorf("a recording that was cut off doesn't replay: %v", err)
	}
}

// What can't be recorded is told of, and the build goes on.
func TestRecordingFails(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(file, nil); err == nil || !strings.Contains(err.Error(), "directory of recorded builds: mkdir "+file) {
		t.Errorf("in a file: error %v", err)
	}
	r, log := open(t)
	rec := r.Begin("cut")
	if err := rec.file.Close(); err != nil {
		t.Fatal(err)
	}
	run(rec, "a", "b")
	rec.Close()
	if n := strings.Count(log.String(), "the recording of a build ends early"); n != 1 {
		t.Errorf("told %d times: %s", n, log)
	}
	if err := os.RemoveAll(r.dir); err != nil {
		t.Fatal(err)
	}
	if rec := r.Begin("gone"); rec != nil || !strings.Contains(log.String(), "a build is not recorded") {
		t.Errorf("%v; logged %s", rec, log)
	}
	if rec := (*Recorder)(nil).Begin("nobody"); rec != nil {
		t.Error("a recording of no recorder")
	}
}
