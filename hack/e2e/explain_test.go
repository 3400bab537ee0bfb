//go:build e2e

package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Clients that know nothing of explanations see reasons in the log; kiln's own
// asks for them, also after a restart and after a crash.
func TestExplain(t *testing.T) {
	d := newDaemon(t)
	d.kiln("explain").fails(t, "no build has ended yet")
	dir := files{
		"Dockerfile": strings.ReplaceAll("FROM BASE\nARG V=1\nCOPY src /src\nRUN cat /src/* > /all && echo $V\n", "BASE", env.base),
		"src/a":      "a", "src/b": "b",
	}.write(t)
	ref := filepath.Join(t.TempDir(), "ref")
	build := func(args ...string) {
		t.Helper()
		d.kiln(append([]string{"build", "--ref-file", ref}, append(args, dir)...)...).must(t)
	}
	explained := func(args ...string) string {
		t.Helper()
		return d.kiln(append([]string{"explain"}, args...)...).must(t).stdout
	}
	build()
	first := strings.TrimSpace(readFile(t, ref))
	if err := os.WriteFile(filepath.Join(dir, "src/b"), []byte("changed"), 0o644); err != nil {
		t.Fatal(err)
	}
	build("--build-arg", "V=2")
	want := []string{
		"[2/3] COPY src /src  (Dockerfile:3,", "\n  ran because src/b changed\n",
		"[3/3] RUN cat /src/* > /all && echo 2  (Dockerfile:4,", "\n  ran because the build argument V changed and [2/3] COPY src /src has a new result (src/b changed)\n",
		" ran 2 of 3 steps in ", "; 1 came from the cache.\n", "Compared with build " + first,
	}
	check := func() {
		t.Helper()
		out := explained()
		for _, w := range want {
			if !strings.Contains(out, w) {
				t.Errorf("explain says\n%s\nand not %q", out, w)
			}
		}
		if out := explained(first); !strings.Contains(out, "ran because no earlier run of it is known") {
			t.Errorf("explain %s says\n%s", first, out)
		}
	}
	check()
	var b struct {
		Ref   string
		Steps []struct {
			Name   string
			Causes []struct{ Kind, Subject string }
		}
	}
	if err := json.Unmarshal([]byte(explained("--json")), &b); err != nil || b.Ref != strings.TrimSpace(readFile(t, ref)) || len(b.Steps) != 6 {
		t.Errorf("%+v, %v", b, err)
	}
	if out := explained("--all"); !strings.Contains(out, "came from the cache\n") {
		t.Errorf("explain --all says\n%s", out)
	}
	d.kiln("explain", "nope").fails(t, `build "nope"`)
	d.kiln("explain", "a", "b").fails(t, "one build")
	d.stop()
	d.start()
	check()

	// Upstream's client doesn't say which directory it builds.
	if err := os.WriteFile(filepath.Join(dir, "src/a"), []byte("changed, too"), 0o644); err != nil {
		t.Fatal(err)
	}
	out := d.dockerfileIn(dir, "--opt", "kiln.explain=1", "--progress", "plain").must(t).stderr
	if !strings.Contains(out, "kiln: ran, probably because src/a changed") {
		t.Errorf("upstream's client shows\n%s", out)
	}
	if out := explained(); !strings.Contains(out, "probably because src/a changed") {
		t.Errorf("explain says\n%s", out)
	}

	d.buildctl("prune", "--all").must(t)
	build()
	if out := explained(); !strings.Contains(out, "ran because its result was removed by prune at 20") {
		t.Errorf("explain says\n%s", out)
	}
}
