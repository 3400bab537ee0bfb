package crashtest

import (
	"strings"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/client/llb"
	control "github.com/moby/buildkit/api/services/control"
)

// job is work whose result is known beforehand.
type job struct {
	name string
	// image says that the job makes an image, on one that is pulled, and exports
	// it in each way, with its cache; its result is what is in the image that was
	// pushed. Otherwise a local directory comes in, files are made and removed,
	// processes run, one with a cache mount, and branches are merged.
	image bool
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

// step names a step, so that news of it are known.
func (j *job) step(name string) llb.ConstraintsOpt { return llb.WithCustomName(j.name + " " + name) }

// script is what a shell of busybox does.
func (j *job) script(busybox, script string) llb.RunOption {
	script = strings.NewReplacer("NAME", j.name, "BUSYBOX", busybox).Replace(script)
	return llb.Args([]string{busybox, "sh", "-c", script})
}

// state is the definition of a job that makes files.
func (j *job) state() llb.State {
	run := func(s llb.State, script, name string, opts ...llb.RunOption) llb.State {
		return s.Run(append(opts, j.script("/busybox", script), j.step(name))...).Root()
	}
	base := llb.Scratch().File(llb.Copy(llb.Local("in", llb.SharedKeyHint("in")), "busybox", "/busybox"), j.step("base"))
	one := run(base.File(llb.Mkfile("/name", 0o644, []byte(j.name)), j.step("name")),
		"echo NAME one > /one; BUSYBOX dd if=/dev/zero of=/big bs=64k count=8 2> /dev/null", "one")
	two := run(one, "BUSYBOX sha256sum /one > /two; echo NAME >> /cache/log", "two",
		llb.AddMount("/cache", llb.Scratch(), llb.AsPersistentCacheDir("log", llb.CacheMountShared)))
	all := run(two.File(llb.Rm("/big"), j.step("rm")), "BUSYBOX cat /one /two /name > /all", "all")
	side := run(base, "echo NAME side > /side", "side")
	both := llb.Merge([]llb.State{all, side}, j.step("merge"))
	return j.take(both)
}

// imageState is the definition of the image.
func (j *job) imageState(base string) llb.State {
	run := func(s llb.State, script, name string) llb.State {
		return s.Run(j.script("/bin/busybox", script), j.step(name)).Root()
	}
	one := run(llb.Image(base), "echo NAME one > /one; BUSYBOX dd if=/dev/zero of=/big bs=64k count=8 2> /dev/null", "one")
	two := run(one, "BUSYBOX sha256sum /one > /two; rm /big", "two")
	return run(two, "{ cat /one /two; printf NAME; } > /all; echo NAME side > /side", "all")
}

// take copies the result out of s.
func (j *job) take(s llb.State) llb.State {
	return llb.Scratch().
		File(llb.Copy(s, "/all", "/all"), j.step("copy all")).
		File(llb.Copy(s, "/side", "/side"), j.step("copy side"))
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

func (j *job) ran(step string) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.again[step]
}
