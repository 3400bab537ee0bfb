//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/hack/harness"
	"github.com/kilnbuild/kiln/worker/verify"
)

// page fetches a debug page of a daemon that was started with
// --debugaddr 127.0.0.1:0.
func (d *daemon) page(path string) (string, error) {
	m := regexp.MustCompile(`serving metrics and debug pages" address=(\S+)`).FindStringSubmatch(d.log.String())
	if m == nil {
		return "", fmt.Errorf("the daemon didn't say where its debug pages are:\n%s", d.log)
	}
	resp, err := http.Get("http://" + m[1] + path)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", path, resp.Status, body)
	}
	return string(body), err
}

// verified waits until nothing is left to verify and the checks were as many as
// wanted.
func (d *daemon) verified(want map[verify.Outcome]int) (s verify.Summary) {
	d.t.Helper()
	err := harness.WaitFor(harness.Patience, func() error {
		body, err := d.page("/debug/cache/verify")
		if err != nil {
			return err
		}
		s = verify.Summary{}
		if err := json.Unmarshal([]byte(body), &s); err != nil {
			return err
		}
		for o, n := range want {
			if s.Queued > 0 || s.Counts[o] != n {
				return fmt.Errorf("want %v:\n%s", want, body)
			}
		}
		return nil
	})
	if err != nil {
		d.t.Fatal(err)
	}
	return s
}

func TestVerifyCache(t *testing.T) {
	d := newDaemon(t, "--cache-verify=1", "--debugaddr=127.0.0.1:0")
	dir := withBase(files{
		"Dockerfile": "FROM BASE\nRUN echo fixed > /fixed\nRUN head -c 16 /dev/urandom > /random\nCOPY file /file\n" +
			"RUN --mount=type=secret,id=s,required=false true\n",
		"file": "of the client\n",
	}).write(t)
	build := func() (log, fixed string) {
		t.Helper()
		out := t.TempDir()
		r := d.dockerfileIn(dir, "--output", "type=local,dest="+out).must(t)
		return r.stderr, readFile(t, out, "fixed")
	}
	build()
	build()
	// The echo and the copy; the step with the secret is left alone.
	s := d.verified(map[verify.Outcome]int{verify.Equal: 2, verify.Nondeterministic: 1, verify.Wrong: 0, verify.Failed: 0, verify.Unsure: 0})
	if len(s.Findings) != 1 || len(s.Findings[0].Paths) != 1 || s.Findings[0].Paths[0] != "/random (content)" ||
		!strings.Contains(s.Findings[0].Step, "urandom") {
		t.Errorf("findings %+v", s.Findings)
	}

	// No step copies the file: a COPY notices that it was written to, and the
	// record is lost before it can be verified.
	found, err := filepath.Glob(filepath.Join(d.root, "snapshots", "*", "fs", "fixed"))
	if err != nil || len(found) == 0 {
		t.Fatalf("%q, %v", found, err)
	}
	for _, path := range found { // what was made to compare is going
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil {
			_, err = f.WriteString("wrong\n")
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if log, fixed := build(); fixed != "wrong\n" || !strings.Contains(log, "CACHED") {
		t.Fatalf("the damage shows as %q:\n%s", fixed, log)
	}
	s = d.verified(map[verify.Outcome]int{verify.Wrong: 1})
	if last := s.Findings[len(s.Findings)-1]; last.Outcome != verify.Wrong || last.Paths[0] != "/fixed (content)" || last.Forgotten < 4 {
		t.Errorf("finding %+v", last)
	}
	d.logs("level=ERROR msg=\"cache verify: a cached result was wrong")
	if log, fixed := build(); fixed != "fixed\n" {
		t.Errorf("the next build brings %q:\n%s", fixed, log)
	}
	metrics, err := d.page("/metrics")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"\nkiln_verify_total{outcome=\"wrong\"} 1\n", "\nkiln_builds_started_total 4\n", "\nkiln_builds_running 0\n",
		"\nbuildkit_builds_total{status=\"success\",error_code=\"\"} 4\n",
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("metrics lack %q:\n%s", want, metrics)
		}
	}
}
