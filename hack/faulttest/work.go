package faulttest

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/client"
	"github.com/kilnbuild/kiln/client/llb"
	"github.com/kilnbuild/kiln/hack/harness"
	control "github.com/moby/buildkit/api/services/control"
)

// work is what builds need beside the daemon: a registry, a web server, files.
type work struct {
	dir, addr string
	registry  *harness.Registry
	base      string
	web       http.Server
	url       string
	serving   sync.WaitGroup
}

func newWork(dir, addr string) (*work, error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	reg, err := harness.StartRegistry(dir)
	if err != nil {
		return nil, err
	}
	w := &work{dir: dir, addr: addr, registry: reg}
	if _, w.base, err = reg.PushBusybox(dir); err != nil {
		return nil, errors.Join(err, w.close())
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, errors.Join(err, w.close())
	}
	w.url = "http://" + l.Addr().String() + "/"
	w.web.Handler = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		io.WriteString(rw, content(strings.TrimPrefix(r.URL.Path, "/"))) // a client that is gone is no matter
	})
	w.serving.Go(func() { w.web.Serve(l) }) // until close
	return w, nil
}

func (w *work) close() error {
	w.registry.Stop()
	err := w.web.Close()
	w.serving.Wait()
	return err
}

// size is that of what is written: several requests of the disk.
const size = 700_000

// content is what the job of that name makes.
func content(name string) string { return strings.Repeat(name+"\n", size/len(name)+1)[:size] }

// script is the shell's way to have it in a file, through the end of a command. The
// shell goes by the last command of a pipeline: that a program in it couldn't
// be read from a bad disk is seen by the size.
func script(name, sink, file string) string {
	return fmt.Sprintf("yes %s | head -c %d | %s%s && [ $(wc -c < %s) = %d ]", name, size, sink, file, file, size)
}

// kind is a kind of work. All of them make a file data with the job's content, but
// that a kind without file makes only what export says.
type kind struct {
	name string
	// warm says that the image is unpacked before the disk is bad.
	warm  bool
	state func(j *job) llb.State
	// export adds to how the result is taken out.
	export func(j *job, o *client.SolveOptions)
	// logs says that the job prints its content.
	logs bool
	// verify looks at what was exported.
	verify func(j *job, ctx context.Context) error
}

var kinds = []kind{
	{name: "pull", state: func(j *job) llb.State {
		return j.result(j.image().File(llb.Mkfile("/data", 0o644, []byte(j.content))))
	}},
	{name: "run", warm: true, state: func(j *job) llb.State {
		one := j.run(j.image(), script(j.name, "cat > ", "/one")).Root()
		return j.result(j.run(one, "cp /one /data").Root())
	}},
	{name: "cache mount", warm: true, state: func(j *job) llb.State {
		mount := llb.AddMount("/cache", llb.Scratch(), llb.AsPersistentCacheDir("c", llb.CacheMountShared))
		// A file that has its name was on the disk, and is for good.
		one := j.run(j.image(), "for f in /cache/*.ok; do [ ! -e $f ] || n=$(basename $f .ok); [ ! -e $f ] || yes $n | head -c "+fmt.Sprint(size)+" | cmp - $f || exit 77; done; "+
			script(j.name, "dd bs=4096 conv=fsync of=", "/cache/new")+" && mv /cache/new /cache/"+j.name+".ok && cp /cache/"+j.name+".ok /one", mount).Root()
		return j.result(j.run(one, "mv /one /data", mount).Root())
	}},
	{name: "logs", warm: true, logs: true, state: func(j *job) llb.State {
		return j.result(j.run(j.image(), script(j.name, "tee ", "/data")).Root())
	}},
	{name: "local", state: func(j *job) llb.State {
		in := llb.Local("in", llb.SharedKeyHint("in"))
		return j.result(in)
	}},
	{name: "http", state: func(j *job) llb.State {
		return j.result(llb.HTTP(j.w.url+j.name, llb.Filename("data")))
	}},
	{name: "image", warm: true, state: imageState, verify: (*job).verifyImage, export: func(j *job, o *client.SolveOptions) {
		o.Exports = append(o.Exports, client.Export{Type: "image", Attrs: map[string]string{"name": j.pushed(), "push": "true"}})
	}},
	{name: "archive", warm: true, state: imageState, verify: (*job).verifyArchive, export: func(j *job, o *client.SolveOptions) {
		o.Exports = append(o.Exports, client.Export{Type: "oci", Output: func(map[string]string) (io.WriteCloser, error) { return os.Create(j.archive()) }})
	}},
	{name: "cache export", warm: true, state: imageState, verify: (*job).verifyCache, export: func(j *job, o *client.SolveOptions) {
		o.CacheExports = []client.Cache{j.cache()}
	}},
}

// imageState's result has two layers above the base image.
func imageState(j *job) llb.State {
	return j.run(j.run(j.image(), script(j.name, "cat > ", "/one")).Root(), "cp /one /data").Root()
}

// job is a piece of work of its own, whose result is known.
type job struct {
	kind
	w             *work
	name, content string
}

func (w *work) job(k kind, n int) *job {
	name := fmt.Sprintf("%s%d", strings.ReplaceAll(k.name, " ", "-"), n)
	return &job{kind: k, w: w, name: name, content: content(name)}
}

func (j *job) image() llb.State { return llb.Image(j.w.base) }

func (j *job) run(on llb.State, script string, opts ...llb.RunOption) llb.ExecState {
	return on.Run(append([]llb.RunOption{llb.Args([]string{"/bin/sh", "-c", script})}, opts...)...)
}

func (j *job) result(s llb.State) llb.State {
	return llb.Scratch().File(llb.Copy(s, "/data", "/data"))
}

func (j *job) pushed() string  { return j.w.registry.Host + "/made/" + j.name + ":latest" }
func (j *job) archive() string { return filepath.Join(j.w.dir, "archive.tar") }
func (j *job) cache() client.Cache {
	return client.Cache{Type: "registry", Attrs: map[string]string{"ref": j.w.registry.Host + "/cache/" + j.name + ":latest", "mode": "max"}}
}

// prepare does what is to be done before the disk is bad.
func (j *job) prepare(ctx context.Context) error {
	if !j.warm {
		return nil
	}
	warm := j.run(j.image(), "echo warm > /warm").Root()
	_, err := j.solve(ctx, warm, client.SolveOptions{}, "warm")
	return err
}

// outcome is that of a build.
type outcome struct {
	err   error
	wrong string // what is wrong with its result
	log   string // what its steps printed, for errors
}

// build builds the job, and compares.
func (j *job) build(ctx context.Context) outcome {
	var opts client.SolveOptions
	if j.export != nil {
		j.export(j, &opts)
	}
	return j.buildWith(ctx, opts)
}

func (j *job) buildWith(ctx context.Context, opts client.SolveOptions) (out outcome) {
	opts.Ref = rand.Text()
	log, err := j.solve(ctx, j.state(j), opts, "data")
	out.err, out.log = err, log
	switch {
	case errors.Is(err, errWrong):
		out.wrong = err.Error()
	case err == nil && j.logs && log != "": // it has run
		log, out.err = j.replay(ctx, opts.Ref)
		if out.err == nil && !strings.Contains(log, j.content) && !strings.Contains(log, "output is missing") {
			out.wrong = fmt.Sprintf("of the log, %d bytes are there, and it isn't said that more are missing", len(log))
		}
	}
	if len(out.log) > 1000 && !j.logs {
		out.log = out.log[len(out.log)-1000:]
	}
	return out
}

// replay is the whole of what the steps of a build that has ended printed.
func (j *job) replay(ctx context.Context, ref string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	c, err := client.New(j.w.addr, client.Options{})
	if err != nil {
		return "", err
	}
	defer c.Close() // the error of the status says more
	var text bytes.Buffer
	err = c.Status(ctx, ref, func(resp *control.StatusResponse) {
		for _, l := range resp.Logs {
			text.Write(l.Msg)
		}
	})
	return text.String(), err
}

var errWrong = errors.New("wrong content")

// patience is how long a build may take.
const patience = 2 * time.Minute

// solve builds s; if there is file in the result it must be the job's.
func (j *job) solve(ctx context.Context, s llb.State, opts client.SolveOptions, file string) (log string, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	def, err := s.Marshal()
	if err != nil {
		return "", err
	}
	c, err := client.New(j.w.addr, client.Options{})
	if err != nil {
		return "", err
	}
	defer c.Close() // the error of the build says more
	dir, err := os.MkdirTemp(j.w.dir, "result-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
	if err := errors.Join(os.Mkdir(in, 0o755), os.Mkdir(out, 0o755), os.WriteFile(filepath.Join(in, "data"), []byte(j.content), 0o644)); err != nil {
		return "", err
	}
	opts.Definition, opts.Locals, opts.SharedKey = def, map[string]string{"in": in}, "fault"
	opts.Exports = append(opts.Exports, client.Export{Type: "local", OutputDir: out})
	var text bytes.Buffer
	_, err = c.Solve(ctx, opts, func(resp *control.StatusResponse) {
		for _, l := range resp.Logs {
			text.Write(l.Msg)
		}
	})
	if err == nil && file == "data" {
		if data, rerr := os.ReadFile(filepath.Join(out, file)); rerr != nil || string(data) != j.content {
			err = fmt.Errorf("%w: %d bytes, beginning with %.20q, error %v", errWrong, len(data), data, rerr)
		}
	}
	return text.String(), err
}

// verifyImage builds from the pushed image.
func (j *job) verifyImage(ctx context.Context) error {
	_, err := j.solve(ctx, j.result(llb.Image(j.pushed())), client.SolveOptions{}, "data")
	return err
}

// verifyArchive compares what is in the archive with its digests.
func (j *job) verifyArchive(context.Context) error { return harness.CheckArchive(j.archive()) }

// verifyCache builds with nothing but the exported cache.
func (j *job) verifyCache(ctx context.Context) error {
	c, err := client.New(j.w.addr, client.Options{})
	if err != nil {
		return err
	}
	err = c.Prune(ctx, client.PruneOptions{All: true}, func(*control.UsageRecord) error { return nil })
	if err = errors.Join(err, c.Close()); err != nil {
		return err
	}
	out := j.buildWith(ctx, client.SolveOptions{CacheImports: []client.Cache{j.cache()}})
	return out.err
}

// verify looks at what the job has exported beside its file.
func (j *job) verify(ctx context.Context) error {
	if j.kind.verify == nil {
		return nil
	}
	return j.kind.verify(j, ctx)
}
