package crashtest

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/client"
	"github.com/kilnbuild/kiln/client/llb"
	"github.com/kilnbuild/kiln/hack/harness"
)

// jobs are all there are, and what they need beside the daemon.
type jobs struct {
	out      string
	local    string
	kept     time.Duration // how long the daemon doesn't collect what was used
	registry *harness.Registry
	base     string // the image in it

	mu     sync.Mutex // guards the fields below
	all    []*job
	recent []*job // touched since the last crash
	wrong  []string
	ended  int
}

func newJobs(dir string, kept time.Duration) (*jobs, error) {
	j := &jobs{out: filepath.Join(dir, "out"), local: filepath.Join(dir, "in"), kept: kept}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return nil, fmt.Errorf("%w: install the package busybox-static", err)
	}
	err = errors.Join(os.Mkdir(j.out, 0o755), os.Mkdir(j.local, 0o755), os.WriteFile(filepath.Join(j.local, "busybox"), busybox, 0o755))
	if err != nil {
		return nil, err
	}
	if j.registry, err = harness.StartRegistry(dir); err != nil {
		return nil, err
	}
	if _, j.base, err = j.registry.PushBusybox(dir); err != nil {
		j.close()
		return nil, err
	}
	return j, nil
}

func (js *jobs) close() { js.registry.Stop() }

// pick returns a new job, or now and then one that there is.
func (js *jobs) pick(rnd *rand.Rand) *job {
	js.mu.Lock()
	defer js.mu.Unlock()
	var j *job
	if len(js.all) > 0 && rnd.IntN(3) == 0 {
		j = js.all[max(0, len(js.all)-1-rnd.IntN(20))]
	} else {
		name := fmt.Sprintf("job%d", len(js.all))
		j = &job{name: name, image: rnd.IntN(4) == 0, since: time.Now(), told: map[string]time.Time{}, again: map[string]bool{}, files: map[string]string{
			"all":  fmt.Sprintf("%s one\n%x  /one\n%s", name, sha256.Sum256([]byte(name+" one\n")), name),
			"side": name + " side\n",
		}}
		js.all = append(js.all, j)
	}
	js.recent = append(js.recent, j)
	return j
}

// touched returns the jobs that the crash interrupted, and up to n others, and
// forgets which those were. One of the others may be collected, as may be of it
// what is as old.
func (js *jobs) touched(rnd *rand.Rand, n int) (interrupted, some []*job) {
	js.mu.Lock()
	defer js.mu.Unlock()
	seen := map[*job]bool{}
	for _, j := range js.recent {
		if !seen[j] && !j.isDone() {
			interrupted = append(interrupted, j)
		}
		seen[j] = true
	}
	js.recent = nil
	young, _ := slices.BinarySearchFunc(js.all, time.Now().Add(-js.kept), func(j *job, then time.Time) int { return j.since.Compare(then) })
	for i := range min(n, len(js.all)) {
		from := young
		if i == 0 || from == len(js.all) {
			from = 0
		}
		if j := js.all[from+rnd.IntN(len(js.all)-from)]; !seen[j] {
			seen[j] = true
			some = append(some, j)
		}
	}
	return interrupted, some
}

// mayBeCollected says whether the daemon may have removed what was made of j.
func (js *jobs) mayBeCollected(j *job) bool { return time.Since(j.since) >= js.kept }

func (js *jobs) complain(what string) {
	js.mu.Lock()
	defer js.mu.Unlock()
	js.wrong = append(js.wrong, what)
}

func (js *jobs) complaints() []string {
	js.mu.Lock()
	defer js.mu.Unlock()
	out := js.wrong
	js.wrong = nil
	return out
}

func (js *jobs) finished() int {
	js.mu.Lock()
	defer js.mu.Unlock()
	return js.ended
}

// build builds j and compares the result: wrong says what isn't as it should be.
// afterCrash says that nobody has built j since the last one.
func (js *jobs) build(ctx context.Context, addr string, j *job, afterCrash bool) (wrong string, err error) {
	c, err := client.New(addr, client.Options{})
	if err != nil {
		return "", err
	}
	defer c.Close() // the connection of a daemon that is gone may complain
	dir, err := os.MkdirTemp(js.out, "result-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	j.begin(afterCrash)
	archive, err := js.solve(ctx, c, j, dir)
	j.setDone(err == nil)
	if err != nil {
		return "", fmt.Errorf("build %s: %w", j.name, err)
	}
	js.mu.Lock()
	js.ended++
	js.mu.Unlock()
	for name, want := range j.files {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			wrong = fmt.Sprintf("%s of %s is %q, not %q (error %v)", name, j.name, got, want, err)
		}
	}
	if archive != "" {
		if err := harness.CheckArchive(archive); err != nil {
			wrong = fmt.Sprintf("the archive of %s: %v", j.name, err)
		}
	}
	return wrong, nil
}

// solve puts the job's result into dir, and what archive of its image there is.
func (js *jobs) solve(ctx context.Context, c *client.Client, j *job, dir string) (archive string, err error) {
	result := j.state()
	if j.image {
		name := fmt.Sprintf("%s/made/%s:latest", js.registry.Host, j.name)
		archive = filepath.Join(dir, "archive.tar")
		err = js.solveState(ctx, c, j, j.imageState(js.base), client.SolveOptions{
			Exports: []client.Export{
				{Type: "image", Attrs: map[string]string{"name": name, "push": "true"}},
				{Type: "oci", Output: func(map[string]string) (io.WriteCloser, error) { return os.Create(archive) }},
			},
			CacheExports: []client.Cache{{Type: "registry", Attrs: map[string]string{"ref": fmt.Sprintf("%s/cache/%s:latest", js.registry.Host, j.name), "mode": "max"}}},
		})
		if err != nil {
			return "", err
		}
		result = j.take(llb.Image(name))
	}
	return archive, js.solveState(ctx, c, j, result, client.SolveOptions{
		Locals: map[string]string{"in": js.local}, SharedKey: "crash",
		Exports: []client.Export{{Type: "local", OutputDir: dir}},
	})
}

func (js *jobs) solveState(ctx context.Context, c *client.Client, j *job, s llb.State, opts client.SolveOptions) (err error) {
	if opts.Definition, err = s.Marshal(); err != nil {
		return err
	}
	_, err = c.Solve(ctx, opts, j.status)
	return err
}

// crashed forgets what clients were told after then: it may be lost.
func (js *jobs) crashed(then time.Time) {
	js.mu.Lock()
	defer js.mu.Unlock()
	for _, j := range js.all {
		j.mu.Lock()
		maps.DeleteFunc(j.told, func(_ string, when time.Time) bool { return !when.Before(then) })
		j.mu.Unlock()
	}
}
