package crashtest

import (
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/client"
	"github.com/kilnbuild/kiln/client/llb"
	control "github.com/moby/buildkit/api/services/control"
)

// job is a build whose result is known beforehand: a local directory comes in,
// files are made and removed, processes run, one with a cache mount, branches
// are merged, and two files come out.
type job struct {
	name  string
	files map[string]string // the result

	since time.Time // nothing of it was made before

	mu    sync.Mutex           // guards the fields below
	told  map[string]time.Time // when a client was told that the step was done
	again map[string]bool      // steps that ran in the last build
	done  bool                 // a client was told that the build was done
	// afterCrash: what is found now was on disk.
	afterCrash bool
}

// shared is the end of the name of a step that is the same in all jobs: another
// one may have run it a moment ago.
const shared = " base"

// jobs are all there are.
type jobs struct {
	out   string
	local string
	kept  time.Duration // how long the daemon doesn't collect what was used

	mu     sync.Mutex // guards the fields below
	all    []*job
	recent []*job // touched since the last crash
	wrong  []string
	ended  int
}

func newJobs(out string, kept time.Duration) (*jobs, error) {
	j := &jobs{out: out, local: filepath.Join(out, "in"), kept: kept}
	if err := os.MkdirAll(j.local, 0o755); err != nil {
		return nil, err
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return nil, fmt.Errorf("%w: install the package busybox-static", err)
	}
	return j, os.WriteFile(filepath.Join(j.local, "busybox"), busybox, 0o755)
}

// pick returns a new job, or now and then one that there is.
func (js *jobs) pick(rnd *rand.Rand) *job {
	js.mu.Lock()
	defer js.mu.Unlock()
	var j *job
	if len(js.all) > 0 && rnd.IntN(3) == 0 {
		j = js.all[max(0, len(js.all)-1-rnd.IntN(20))]
	} else {
		name := fmt.Sprintf("job%d", len(js.all))
		j = &job{name: name, since: time.Now(), told: map[string]time.Time{}, again: map[string]bool{}, files: map[string]string{
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

// state is the job's definition.
func (j *job) state() llb.State {
	step := func(name string) llb.ConstraintsOpt { return llb.WithCustomName(j.name + " " + name) }
	sh := func(script string) llb.RunOption {
		return llb.Args([]string{"/busybox", "sh", "-c", strings.ReplaceAll(script, "NAME", j.name)})
	}
	base := llb.Scratch().File(llb.Copy(llb.Local("in", llb.SharedKeyHint("in")), "busybox", "/busybox"), step("base"))
	one := base.File(llb.Mkfile("/name", 0o644, []byte(j.name)), step("name")).
		Run(sh("echo NAME one > /one; /busybox dd if=/dev/zero of=/big bs=64k count=8 2> /dev/null"), step("one")).Root()
	two := one.Run(sh("/busybox sha256sum /one > /two; echo NAME >> /cache/log"),
		llb.AddMount("/cache", llb.Scratch(), llb.AsPersistentCacheDir("log", llb.CacheMountShared)), step("two")).Root()
	all := two.File(llb.Rm("/big"), step("rm")).
		Run(sh("/busybox cat /one /two /name > /all"), step("all")).Root()
	side := base.Run(sh("echo NAME side > /side"), step("side")).Root()
	both := llb.Merge([]llb.State{all, side}, step("merge"))
	return llb.Scratch().
		File(llb.Copy(both, "/all", "/all"), step("copy all")).
		File(llb.Copy(both, "/side", "/side"), step("copy side"))
}

// build builds j and compares the result: wrong says what isn't as it should be.
// afterCrash says that nobody has built j since the last one.
func (js *jobs) build(ctx context.Context, addr string, j *job, afterCrash bool) (wrong string, err error) {
	def, err := j.state().Marshal()
	if err != nil {
		return "", err
	}
	c, err := client.New(addr, client.Options{})
	if err != nil {
		return "", err
	}
	defer c.Close() // the connection of a daemon that is gone may complain
	out, err := os.MkdirTemp(js.out, "result-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(out)
	j.begin(afterCrash)
	_, err = c.Solve(ctx, client.SolveOptions{
		Definition: def, Locals: map[string]string{"in": js.local}, SharedKey: "crash",
		Exports: []client.Export{{Type: "local", OutputDir: out}},
	}, j.status)
	j.setDone(err == nil)
	if err != nil {
		return "", fmt.Errorf("build %s: %w", j.name, err)
	}
	js.mu.Lock()
	js.ended++
	js.mu.Unlock()
	for name, want := range j.files {
		if got, err := os.ReadFile(filepath.Join(out, name)); err != nil || string(got) != want {
			wrong = fmt.Sprintf("%s of %s is %q, not %q (error %v)", name, j.name, got, want, err)
		}
	}
	return wrong, nil
}

func (j *job) begin(afterCrash bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.afterCrash = afterCrash
	clear(j.again)
}

func (j *job) setDone(done bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.done = done
}

func (j *job) isDone() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.done
}

// status notes what a client is told.
func (j *job) status(resp *control.StatusResponse) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, v := range resp.Vertexes {
		if v.Completed == nil || v.Error != "" || !strings.HasPrefix(v.Name, j.name+" ") {
			continue
		}
		_, known := j.told[v.Name]
		switch {
		case !v.Cached:
			j.told[v.Name], j.again[v.Name] = time.Now(), true
		case !known && j.afterCrash && !strings.HasSuffix(v.Name, shared):
			j.told[v.Name] = time.Time{}
		case !known:
			j.told[v.Name] = time.Now()
		}
	}
}

// due are the steps that a client was told of, and that can't be lost.
func (j *job) due() (out []string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for step := range j.told {
		out = append(out, step)
	}
	return out
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

func (j *job) ran(step string) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.again[step]
}
