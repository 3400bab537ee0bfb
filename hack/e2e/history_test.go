//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/hack/harness"
)

// built builds and returns the build's ref, whether it succeeded or not.
func (d *daemon) built(dockerfile string, args ...string) string {
	d.t.Helper()
	file := filepath.Join(d.t.TempDir(), "ref")
	d.dockerfile(dockerfile, nil, append(args, "--ref-file", file)...)
	return readFile(d.t, file)
}

// What is known of a build outlives the daemon, until it is deleted.
// compat: CTL-061, CTL-140, BCL-037, BCL-063, BCL-074, BCL-075, BCL-077
func TestHistoryIsKept(t *testing.T) {
	d := newDaemon(t)
	ok := d.built("FROM BASE\nRUN echo words of the first\n")
	failed := d.built("FROM BASE\nRUN echo words of the second; exit 4\n")
	list := func() string { return d.buildctl("debug", "histories").must(t).stdout }
	for _, when := range []string{"at once", "after a restart"} {
		for ref, words := range map[string][]string{ok: {"words of the first", "DONE"}, failed: {"words of the second", "exit code: 4"}} {
			r := d.buildctl("debug", "logs", "--progress", "plain", ref).must(t)
			for _, want := range words {
				if !strings.Contains(r.stdout+r.stderr, want) {
					t.Errorf("%s the log of %s lacks %q:\n%s%s", when, ref, want, r.stdout, r.stderr)
				}
			}
		}
		if got := list(); !strings.Contains(got, ok) || !strings.Contains(got, failed) {
			t.Errorf("%s the history is\n%s", when, got)
		}
		d.stop()
		d.start()
	}
	d.buildctl("debug", "ctl", "--pin", ok).must(t)
	d.buildctl("prune-histories").must(t)
	if got := list(); !strings.Contains(got, ok) || strings.Contains(got, failed) {
		t.Errorf("after prune-histories, with one record pinned, the history is\n%s", got)
	}
	d.buildctl("debug", "ctl", "--unpin", ok).must(t)
	d.buildctl("debug", "ctl", "--delete", ok).must(t)
	if got := list(); strings.Contains(got, ok) {
		t.Errorf("after it was deleted, %s is in the history\n%s", ok, got)
	}
	d.buildctl("debug", "ctl", "--delete", ok).fails(t, ok, "no record")
}

// A client is shown a part of what a step prints, the history has all of it, also
// of a failed step and of one that runs in the daemon itself, and lets go of it with
// the record.
// compat: CTL-061, CTL-074
func TestWholeLogIsKept(t *testing.T) {
	d := newDaemon(t)
	secret := filepath.Join(t.TempDir(), "s")
	if err := os.WriteFile(secret, []byte("hush"), 0o600); err != nil {
		t.Fatal(err)
	}
	const lines = 400000 // 3.2 MB, of which 2 MiB are shown, and of a failed step the last 256 KiB
	for name, step := range map[string]string{
		"ok":        "RUN seq 1000000 1399999",
		"failed":    "RUN seq 1000000 1399999; exit 4",
		"in daemon": "RUN --mount=type=secret,id=s seq 1000000 1399999",
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "ref")
			r := d.dockerfile("FROM BASE\n"+step+"\n", nil, "--ref-file", file, "--secret", "id=s,src="+secret)
			if !strings.Contains(r.stderr, "[output clipped, log limit ") || strings.Contains(r.stderr, " 1300000\n") {
				t.Errorf("the client is shown all, or isn't told that it isn't: %s", tail(r.stderr, 5))
			}
			ref := readFile(t, file)
			for _, when := range []string{"at once", "after a restart"} {
				out := d.buildctl("debug", "logs", "--progress", "rawjson", ref).must(t)
				if n := loggedLines(t, out.stdout+out.stderr); n != lines {
					t.Errorf("%s the history has %d lines", when, n)
				}
				if when == "at once" {
					d.stop()
					d.start()
				}
			}
			d.buildctl("debug", "ctl", "--delete", ref).must(t)
			if left, err := os.ReadDir(filepath.Join(d.root, "logs")); err != nil || len(left) > 0 {
				t.Errorf("after the record: %v, %v", left, err)
			}
		})
	}
}

// loggedLines checks that messages as JSON have the numbers from 1000000 on, each on
// a line, and returns how many.
func loggedLines(t *testing.T, messages string) int {
	t.Helper()
	var printed strings.Builder
	dec := json.NewDecoder(strings.NewReader(messages))
	for dec.More() {
		var msg struct {
			Logs []struct {
				Data []byte `json:"data"`
			} `json:"logs"`
		}
		if err := dec.Decode(&msg); err != nil {
			t.Fatal(err)
		}
		for _, l := range msg.Logs {
			printed.Write(l.Data)
		}
	}
	n := 0
	for line := range strings.Lines(printed.String()) {
		if want := fmt.Sprintln(1000000 + n); line != want {
			t.Fatalf("line %d is %q", n, line)
		}
		n++
	}
	return n
}

// compat: BCL-076, CTL-139
func TestHistoryIsWatched(t *testing.T) {
	d := newDaemon(t)
	watcher := d.client(filepath.Join(env.peer, "buildctl"), "debug", "monitor", "--completed")
	var out lockedBuffer
	watcher.Stdout, watcher.Stderr = &out, os.Stderr
	if err := watcher.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		watcher.Process.Kill() // an error means that it has ended
		watcher.Wait()         // likewise
	})
	ref := d.built("FROM BASE\nRUN true\n")
	if err := harness.WaitFor(harness.Patience, func() error {
		if !strings.Contains(out.String(), ref) {
			return os.ErrNotExist
		}
		return nil
	}); err != nil {
		t.Errorf("the watcher of the history heard nothing of %s:\n%s", ref, out.String())
	}
}

// compat: CTL-100, CTL-107, BCL-060, BCL-061, BCL-062
func TestUsageFilters(t *testing.T) {
	d := newDaemon(t)
	d.dockerfile("FROM BASE\nCOPY f /f\nRUN --mount=type=cache,target=/c echo x | tee /x /c/x\n", files{"f": "x"}).must(t)
	type record struct {
		ID          string
		Size        int64
		RecordType  string
		Description string
		Mutable     bool
	}
	usage := func(args ...string) []record {
		t.Helper()
		var out []record
		text := d.buildctl(append([]string{"du", "--format", "{{json .}}"}, args...)...).must(t).stdout
		if err := json.Unmarshal([]byte(text), &out); err != nil {
			t.Fatalf("%v in %s", err, text)
		}
		return out
	}
	all := usage()
	kinds := map[string]int{}
	for _, r := range all {
		kinds[r.RecordType]++
	}
	if kinds["exec.cachemount"] != 1 || kinds["source.local"] == 0 || kinds["regular"] == 0 {
		t.Errorf("kinds of records: %v", kinds)
	}
	for _, kind := range []string{"exec.cachemount", "source.local", "regular"} {
		if got := usage("--filter", "type=="+kind); len(got) != kinds[kind] || got[0].RecordType != kind {
			t.Errorf("du of type %s says %+v", kind, got)
		}
	}
	mount := usage("--filter", "type==exec.cachemount")[0]
	if got := usage("--filter", "id=="+mount.ID); len(got) != 1 || got[0].ID != mount.ID || !got[0].Mutable {
		t.Errorf("du of %s says %+v", mount.ID, got)
	}
	if got := usage("--filter", "id==nobody"); len(got) != 0 {
		t.Errorf("du of nobody says %+v", got)
	}
	d.buildctl("du", "--filter", "((").fails(t, "filter", "parse error")
	d.buildctl("prune", "--filter", "((").fails(t, "filter", "parse error")
	d.buildctl("prune", "--filter", "id==nobody").must(t)
	d.buildctl("prune", "--keep-storage", "1000000").must(t)
	if got := usage(); len(got) != len(all) {
		t.Errorf("%d records are left of %d, and none was to go", len(got), len(all))
	}
	pruned := d.buildctl("prune", "--filter", "id=="+mount.ID).must(t).stdout
	if !strings.Contains(pruned, mount.ID) || strings.Count(pruned, "\n") != 3 {
		t.Errorf("prune of one record says %q", pruned)
	}
	if got := usage(); len(got) != len(all)-1 {
		t.Errorf("%d records are left of %d, and one was to go", len(got), len(all))
	}
}
