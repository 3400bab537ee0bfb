package build

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/frontend"
	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/ops/source/registry/registrytest"
	"github.com/kilnbuild/kiln/solver"
	"github.com/kilnbuild/kiln/worker"
	"github.com/kilnbuild/kiln/worker/export"
	control "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"
)

// daemon is an engine on a state directory, with a registry beside it.
type daemon struct {
	t      *testing.T
	root   string
	reg    *registrytest.Registry
	log    *sharedLog
	worker *worker.Worker
	engine *Engine
	// out is what the names of images begin with that builds push.
	out     string
	imports []*control.CacheOptionsEntry // of builds
	exports []*control.CacheOptionsEntry
}

// sharedLog is read while what the daemon does in the background writes to it.
type sharedLog struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func (l *sharedLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *sharedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func (l *sharedLog) Reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.Reset()
}

func newDaemon(t *testing.T) *daemon {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts file systems: it needs root")
	}
	d := &daemon{t: t, root: t.TempDir(), reg: registrytest.New(t), log: &sharedLog{}, out: "out"}
	d.reg.Push(t, "base", "1", registrytest.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"},
		Layers:   []map[string]string{{"base": strings.Repeat("base", 1000)}},
	})
	d.start()
	t.Cleanup(func() { d.stop() })
	return d
}

func (d *daemon) start() {
	d.t.Helper()
	log := slog.New(slog.NewTextHandler(d.log, nil))
	w, err := worker.New(context.Background(), worker.Config{Root: d.root, Log: log, Platforms: []string{"linux/amd64"}})
	d.must(err)
	d.worker = w
	d.engine = NewEngine(Config{
		Worker: w, Log: log,
		Export: export.Config{Cache: w.Cache(), Sessions: w.Sessions(), Registry: w.Registry(), Platform: w.Platforms()[0]},
	})
}

func (d *daemon) stop() { d.must(d.worker.Close()) }

func (d *daemon) must(err error) {
	d.t.Helper()
	if err != nil {
		d.t.Fatal(err)
	}
}

// The steps of the test, each on top of the one before:
//
//	base  an image in the registry
//	one   writes a file
//	two   writes another
//	top   writes a third, another one in every variant
//	copy  copies everything from top to an empty directory
var steps = []string{"base", "one", "two", "top", "copy"}

// definition is the step named result and what is below it.
func (d *daemon) definition(result, variant string) *pb.Definition {
	def := &pb.Definition{Metadata: map[string]*pb.OpMetadata{}}
	var last digest.Digest
	add := func(op *pb.Op) {
		if last != "" {
			op.Inputs = []*pb.Input{{Digest: string(last)}}
		}
		dt, err := proto.MarshalOptions{Deterministic: true}.Marshal(op)
		d.must(err)
		def.Def = append(def.Def, dt)
		last = digest.FromBytes(dt)
	}
	write := func(name, data string) *pb.Op {
		return file(&pb.FileAction{Input: 0, SecondaryInput: -1, Action: &pb.FileAction_Mkfile{
			Mkfile: &pb.FileActionMkFile{Path: "/" + name, Mode: 0o640, Data: []byte(data), Timestamp: 1e18},
		}})
	}
	ops := map[string]*pb.Op{
		"base": {Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: "docker-image://" + d.reg.Host + "/base:1"}}},
		"one":  write("one", strings.Repeat("one", 1000)), "two": write("two", "two"), "top": write("top", variant),
		"copy": file(&pb.FileAction{Input: -1, SecondaryInput: 0, Action: &pb.FileAction_Copy{
			Copy: &pb.FileActionCopy{Src: "/", Dest: "/", DirCopyContents: true, Mode: -1, Timestamp: 1e18},
		}}),
	}
	for _, name := range steps {
		add(ops[name])
		def.Metadata[string(last)] = &pb.OpMetadata{Description: map[string]string{"llb.customname": name}}
		if name == result {
			break
		}
	}
	add(&pb.Op{})
	return def
}

func file(a *pb.FileAction) *pb.Op {
	return &pb.Op{
		Op: &pb.Op_File{File: &pb.FileOp{Actions: []*pb.FileAction{a}}}, Platform: &pb.Platform{OS: "linux", Architecture: "amd64"}, Constraints: &pb.WorkerConstraints{},
	}
}

// outcome is what a build made and what it took.
type outcome struct {
	ran   map[string]int // executions, by step
	files map[string]string
}

// trouble happens while a build runs: each is called once, just before that.
type trouble struct {
	preparing func() // what top or copy stands on is fetched, if it isn't here
	mounting  func() // top executes
	digesting func() // top's content is digested
	exporting func() // the result is exported
}

func (d *daemon) build(result, variant string, tr trouble) outcome {
	d.t.Helper()
	return d.run(d.definition(result, variant), result+":"+variant, tr)
}

// run builds def, and pushes it under the given name and tag.
func (d *daemon) run(def *pb.Definition, name string, tr trouble) outcome {
	d.t.Helper()
	id := fmt.Sprintf("build-%d", time.Now().UnixNano())
	ctx, cancel := context.WithCancel(d.t.Context())
	defer cancel()
	b, err := d.engine.register(ctx, Request{Ref: id, Definition: def, CacheImports: d.imports, CacheExports: d.exports})
	d.must(err)
	defer d.engine.running.Done()
	defer b.finish(nil, nil)
	caches, err := b.cacheExporters()
	d.must(err)
	for _, im := range d.imports {
		b.imports.add(im.Type, im.Attrs)
	}

	res, err := b.bridge.Solve(ctx, frontend.SolveRequest{Definition: def})
	d.must(err)
	top := res.Ref.(*ref)
	ran := &counter{n: map[string]int{}}
	interfere(top.edge.Vertex, tr, ran)
	image, err := export.New(d.engine.cfg.Export, "image", map[string]string{"name": d.reg.Host + "/" + d.out + "-" + name, "push": "true", "source-date-epoch": "1000"})
	d.must(err)
	before := sync.OnceFunc(func() {
		if tr.exporting != nil {
			tr.exporting()
		}
	})
	if _, err := b.deliver([]export.Exporter{exporter{image, before}}, caches, res); err != nil {
		d.t.Fatalf("build: %v", err)
	}
	return outcome{ran.counts(), d.files(b, res)}
}

// counter counts by name.
type counter struct {
	mu sync.Mutex // guards n
	n  map[string]int
}

func (c *counter) add(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n[name]++
}

func (c *counter) counts() map[string]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.n)
}

// exporter is one that something happens to before it works.
type exporter struct {
	export.Exporter
	before func()
}

func (e exporter) Export(ctx context.Context, src export.Source, req export.Request) (export.Done, error) {
	e.before()
	return e.Exporter.Export(ctx, src, req)
}

// interfere counts the executions of v and what is below it, and makes trouble
// happen when top runs and when it is digested.
func interfere(v *solver.Vertex, tr trouble, ran *counter) {
	h := hooked{Op: v.Op, preparing: func() {}, mounting: func() {}, ran: func() { ran.add(v.Name) }}
	if (v.Name == "top" || v.Name == "copy") && tr.preparing != nil {
		h.preparing = tr.preparing
	}
	if v.Name == "top" && tr.mounting != nil {
		h.mounting = sync.OnceFunc(tr.mounting)
	}
	if v.Name == "copy" && tr.digesting != nil {
		h.digesting = sync.OnceFunc(tr.digesting)
	}
	v.Op = h
	for _, in := range v.Inputs {
		interfere(in.Vertex, tr, ran)
	}
}

type hooked struct {
	solver.Op
	preparing, mounting, ran func()
	digesting                func() // nil: nothing
}

func (h hooked) Exec(ctx context.Context, asker solver.Asker, inputs []solver.Result) ([]solver.Result, error) {
	h.mounting()
	out, err := h.Op.Exec(ctx, asker, inputs)
	if err == nil {
		h.ran()
	}
	return out, err
}

func (h hooked) CacheMap(ctx context.Context, asker solver.Asker, index int) (*solver.CacheMap, bool, error) {
	m, more, err := h.Op.CacheMap(ctx, asker, index)
	if err != nil {
		return m, more, err
	}
	for i, dep := range m.Deps {
		if dep.Prepare != nil {
			m.Deps[i].Prepare = func(ctx context.Context, asker solver.Asker, in solver.Result) error {
				h.preparing()
				return dep.Prepare(ctx, asker, in)
			}
		}
	}
	if h.digesting != nil {
		for i, dep := range m.Deps {
			m.Deps[i].Content = func(ctx context.Context, asker solver.Asker, in solver.Result) (digest.Digest, error) {
				h.digesting()
				return dep.Content(ctx, asker, in)
			}
		}
	}
	return m, more, err
}

// files is the result, as path: mode and content.
func (d *daemon) files(b *Build, res *frontend.Result) map[string]string {
	d.t.Helper()
	v, err := res.Ref.(*ref).view(d.t.Context())
	d.must(err)
	defer v.Close()
	out := map[string]string{}
	d.must(fs.WalkDir(os.DirFS(v.Path()), ".", func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		data, err := os.ReadFile(filepath.Join(v.Path(), p))
		out[p] = fmt.Sprintf("%s %s", info.Mode(), data)
		return err
	}))
	return out
}

// snapshotOf is the directory of the snapshot that has the file name.
func (d *daemon) snapshotOf(name string) string {
	d.t.Helper()
	found, err := filepath.Glob(filepath.Join(d.root, "snapshots", "*", "fs", name))
	d.must(err)
	for _, f := range found {
		dir := filepath.Dir(filepath.Dir(f))
		if names, _ := os.ReadDir(filepath.Join(dir, "fs")); len(names) == 1 { // not a copy of all
			return dir
		}
	}
	d.t.Fatalf("no snapshot has %s of its own among %q", name, found)
	return ""
}

func (d *daemon) loseSnapshot(name string) func() {
	return func() { d.must(os.RemoveAll(d.snapshotOf(name))) }
}

// damageFile changes the file that the step name wrote, inside its snapshot.
func (d *daemon) damageFile(name string, change func(path string)) func() {
	return func() {
		d.tick()
		change(filepath.Join(d.snapshotOf(name), "fs", name))
	}
}

// tick waits, for some milliseconds at most, until what is written now has a
// later time than what was written before.
func (d *daemon) tick() {
	path := filepath.Join(d.t.TempDir(), "tick")
	for start := time.Now(); ; {
		d.must(os.WriteFile(path, []byte("tick"), 0o600))
		st, err := os.Stat(path)
		d.must(err)
		if st.ModTime().After(start) {
			return
		}
	}
}

// damageCopy changes a file that the step copy wrote.
func (d *daemon) damageCopy(change func(path string)) func() {
	return func() {
		copies, err := filepath.Glob(filepath.Join(d.root, "snapshots", "*", "fs", "one"))
		d.must(err)
		for _, f := range copies {
			if names, _ := os.ReadDir(filepath.Dir(f)); len(names) > 1 {
				d.tick()
				change(f)
				return
			}
		}
		d.t.Fatalf("none of %q is a copy of all", copies)
	}
}

// damageBlobs changes every stored blob of a layer.
func (d *daemon) damageBlobs(change func(path string)) func() {
	return func() {
		paths, err := filepath.Glob(filepath.Join(d.root, "blobs", "sha256", "*"))
		d.must(err)
		if len(paths) == 0 {
			d.t.Fatal("there are no blobs")
		}
		d.tick()
		for _, p := range paths {
			d.must(os.Chmod(p, 0o600))
			change(p)
		}
	}
}

// afterRestart is fn, done to a daemon that hasn't written the blobs itself:
// those are not verified again.
func (d *daemon) afterRestart(fn func()) func() {
	return func() {
		d.stop()
		d.start()
		fn()
	}
}

// collecting is fn, done while everything that isn't in use is collected: in
// the middle of it, if there is anything.
func (d *daemon) collecting(fn func()) func() {
	return func() {
		once := sync.OnceFunc(fn)
		d.must(d.worker.Cache().Prune(context.Background(), cache.PruneOptions{All: true}, func(cache.Usage) error {
			once()
			return nil
		}))
		once()
	}
}

func (d *daemon) deleteFile(p string)   { d.must(os.Remove(p)) }
func (d *daemon) truncateFile(p string) { d.must(os.Truncate(p, 7)) }

func (d *daemon) flipBit(p string) {
	data, err := os.ReadFile(p)
	d.must(err)
	data[len(data)/2] ^= 1
	d.must(os.WriteFile(p, data, 0o600))
}

// damageRecord changes what the database says of the record that a step made.
func (d *daemon) damageRecord(name string, change func(old []byte) []byte) func() {
	return func() {
		d.stop()
		db, err := store.Open(store.Options{Root: d.root})
		d.must(err)
		n := 0
		db.Scan("ref", "", func(id string, value []byte) bool {
			if bytes.Contains(value, []byte(`"`+name+`"`)) {
				n++
				b := &store.Batch{}
				if data := change(slices.Clone(value)); data != nil {
					b.Put("ref", id, data)
				} else {
					b.Delete("ref", id)
				}
				db.Write(b)
			}
			return true
		})
		d.must(db.Close())
		if n != 1 {
			d.t.Fatalf("%d records of %s", n, name)
		}
		d.start()
	}
}

// Whatever is lost, however and whenever: the build succeeds, its output is that
// of a clean build, only what is needed runs again, and the log names what was
// set aside. compat: LLB-173
func TestLost(t *testing.T) {
	for _, tt := range []struct {
		name   string
		before func(d *daemon) func() // between builds
		during func(d *daemon) trouble
		result string // "" is copy
		again  string // the steps that run beside top and copy
		logged string
	}{
		{name: "nothing"},
		{name: "snapshot deleted/before load", before: func(d *daemon) func() { return d.loseSnapshot("two") }, again: "two", logged: "two"},
		{name: "parent's snapshot deleted/before load", before: func(d *daemon) func() { return d.loseSnapshot("one") }, again: "one two", logged: "one"},
		{name: "base's snapshot deleted/before load", before: func(d *daemon) func() { return d.loseSnapshot("base") }, again: "base one two", logged: "base"},
		{name: "snapshot deleted/while mounting", during: func(d *daemon) trouble { return trouble{mounting: d.loseSnapshot("two")} }, again: "two", logged: "two"},
		{name: "parent's snapshot deleted/while mounting", during: func(d *daemon) trouble { return trouble{mounting: d.loseSnapshot("one")} }, again: "one two", logged: "one"},
		{name: "snapshot deleted/while digesting", during: func(d *daemon) trouble { return trouble{digesting: d.loseSnapshot("top")} }, again: "top", logged: "top"},
		{name: "parent's snapshot deleted/while digesting", during: func(d *daemon) trouble { return trouble{digesting: d.loseSnapshot("two")} }, again: "two top", logged: "two"},
		{name: "snapshot deleted/during export", during: func(d *daemon) trouble {
			return trouble{exporting: func() {
				copies, err := filepath.Glob(filepath.Join(d.root, "snapshots", "*", "fs", "top"))
				d.must(err)
				for _, f := range copies {
					d.must(os.RemoveAll(filepath.Dir(filepath.Dir(f))))
				}
			}}
		}, again: "top copy", logged: "top"},
		{
			name: "snapshot deleted/during GC", during: func(d *daemon) trouble { return trouble{mounting: d.collecting(d.loseSnapshot("two"))} },
			again: "two", logged: "two",
		},
		{
			name: "parent's snapshot deleted/during GC", during: func(d *daemon) trouble { return trouble{mounting: d.collecting(d.loseSnapshot("one"))} },
			again: "one two", logged: "one",
		},
		{name: "file deleted/before load", before: func(d *daemon) func() { return d.damageFile("two", d.deleteFile) }, again: "two top", logged: "two"},
		{name: "file truncated/before load", before: func(d *daemon) func() { return d.damageFile("two", d.truncateFile) }, again: "two top", logged: "two"},
		{name: "file bit flipped/before load", before: func(d *daemon) func() { return d.damageFile("one", d.flipBit) }, again: "one two top", logged: "one"},
		{name: "file deleted/while mounting", during: func(d *daemon) trouble { return trouble{mounting: d.damageFile("two", d.deleteFile)} }, again: "two top", logged: "two"},
		{name: "file truncated/while mounting", during: func(d *daemon) trouble { return trouble{mounting: d.damageFile("one", d.truncateFile)} }, again: "one two top", logged: "one"},
		{name: "file bit flipped/while mounting", during: func(d *daemon) trouble { return trouble{mounting: d.damageFile("two", d.flipBit)} }, again: "two top", logged: "two"},
		{name: "file deleted/while digesting", during: func(d *daemon) trouble { return trouble{digesting: d.damageFile("two", d.deleteFile)} }, again: "two top", logged: "two"},
		{name: "file truncated/while digesting", during: func(d *daemon) trouble { return trouble{digesting: d.damageFile("one", d.truncateFile)} }, again: "one two top", logged: "one"},
		{name: "file bit flipped/while digesting", during: func(d *daemon) trouble { return trouble{digesting: d.damageFile("base", d.flipBit)} }, again: "base one two top", logged: "base"},
		{
			name: "file deleted/during GC", during: func(d *daemon) trouble { return trouble{mounting: d.collecting(d.damageFile("two", d.deleteFile))} },
			again: "two top", logged: "two",
		},
		{
			name: "file truncated/during GC", during: func(d *daemon) trouble { return trouble{mounting: d.collecting(d.damageFile("one", d.truncateFile))} },
			again: "one two top", logged: "one",
		},
		{
			name: "file bit flipped/during GC", during: func(d *daemon) trouble { return trouble{mounting: d.collecting(d.damageFile("two", d.flipBit))} },
			again: "two top", logged: "two",
		},
		{name: "file deleted/during export", during: func(d *daemon) trouble { return trouble{exporting: d.damageCopy(d.deleteFile)} }, again: "copy", logged: "copy"},
		{name: "file truncated/during export", during: func(d *daemon) trouble { return trouble{exporting: d.damageCopy(d.truncateFile)} }, again: "copy", logged: "copy"},
		{name: "file bit flipped/during export", during: func(d *daemon) trouble { return trouble{exporting: d.damageCopy(d.flipBit)} }, again: "copy", logged: "copy"},
		{name: "blob deleted/before load", result: "top", before: func(d *daemon) func() { return d.damageBlobs(d.deleteFile) }, logged: "stored blob"},
		{name: "blob truncated/before load", result: "top", before: func(d *daemon) func() { return d.damageBlobs(d.truncateFile) }, logged: "stored blob"},
		{name: "blob bit flipped/before load", result: "top", before: func(d *daemon) func() { return d.afterRestart(d.damageBlobs(d.flipBit)) }, logged: "stored blob"},
		{name: "blob deleted/while mounting", result: "top", during: func(d *daemon) trouble { return trouble{mounting: d.damageBlobs(d.deleteFile)} }, logged: "stored blob"},
		{name: "blob truncated/while mounting", result: "top", during: func(d *daemon) trouble { return trouble{mounting: d.damageBlobs(d.truncateFile)} }, logged: "stored blob"},
		{name: "blob deleted/while digesting", during: func(d *daemon) trouble { return trouble{digesting: d.damageBlobs(d.deleteFile)} }},
		{name: "blob truncated/while digesting", during: func(d *daemon) trouble { return trouble{digesting: d.damageBlobs(d.truncateFile)} }},
		{name: "blob deleted/during export", result: "top", during: func(d *daemon) trouble { return trouble{exporting: d.damageBlobs(d.deleteFile)} }, logged: "stored blob"},
		{name: "blob truncated/during export", result: "top", during: func(d *daemon) trouble { return trouble{exporting: d.damageBlobs(d.truncateFile)} }, logged: "stored blob"},
		{
			name: "blob bit flipped/during export", result: "top", before: func(d *daemon) func() { return d.afterRestart(func() {}) },
			during: func(d *daemon) trouble { return trouble{exporting: d.damageBlobs(d.flipBit)} }, logged: "stored blob",
		},
		{
			name: "blob bit flipped/while mounting", result: "top",
			during: func(d *daemon) trouble { return trouble{mounting: d.damageBlobs(d.flipBit)} }, logged: "stored blob",
		},
		{name: "blob bit flipped/while digesting", during: func(d *daemon) trouble { return trouble{digesting: d.damageBlobs(d.flipBit)} }},
		{
			name: "blob bit flipped by whoever wrote it/before load", result: "top",
			before: func(d *daemon) func() { return d.damageBlobs(d.flipBit) }, logged: "stored blob",
		},
		{
			name: "blob bit flipped by whoever wrote it/during export", result: "top",
			during: func(d *daemon) trouble { return trouble{exporting: d.damageBlobs(d.flipBit)} }, logged: "stored blob",
		},
		{
			name: "blob deleted/during GC", result: "top",
			during: func(d *daemon) trouble { return trouble{exporting: d.collecting(d.damageBlobs(d.deleteFile))} }, logged: "stored blob",
		},
		{
			name: "blob truncated/during GC", result: "top",
			during: func(d *daemon) trouble { return trouble{exporting: d.collecting(d.damageBlobs(d.truncateFile))} }, logged: "stored blob",
		},
		{
			name: "blob bit flipped/during GC", result: "top",
			during: func(d *daemon) trouble { return trouble{exporting: d.collecting(d.damageBlobs(d.flipBit))} }, logged: "stored blob",
		},
		{name: "record deleted/before load", before: func(d *daemon) func() {
			return d.damageRecord("two", func([]byte) []byte { return nil })
		}, again: "two", logged: "cache records are lost"},
		{name: "record truncated/before load", before: func(d *daemon) func() {
			return d.damageRecord("two", func(old []byte) []byte { return old[:len(old)/2] })
		}, again: "two", logged: "record"},
		{name: "record bit flipped/before load", before: func(d *daemon) func() {
			return d.damageRecord("two", func(old []byte) []byte { old[0] ^= 1; return old })
		}, again: "two", logged: "record"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newDaemon(t)
			d.build("two", "first", trouble{}) // which exports, and so makes blobs
			d.log.Reset()
			if tt.before != nil {
				tt.before(d)()
			}
			var tr trouble
			if tt.during != nil {
				tr = tt.during(d)
			}
			result := cmp.Or(tt.result, "copy")
			got := d.build(result, "v", tr)
			want := map[string]int{"top": 1, result: 1}
			for _, name := range strings.Fields(tt.again) {
				want[name]++
			}
			if !maps.Equal(got.ran, want) {
				t.Errorf("executed %v, want %v\nlog:\n%s", got.ran, want, d.log)
			}
			d.compare(got)
			if !strings.Contains(d.log.String(), tt.logged) {
				t.Errorf("the log doesn't name %q:\n%s", tt.logged, d.log)
			}
			if tt.logged == "stored blob" && !strings.Contains(d.log.String(), "blob=sha256:") {
				t.Errorf("the log doesn't name the blob:\n%s", d.log)
			}
			if again := d.build(result, "v", trouble{}); len(again.ran) > 0 {
				t.Errorf("the same build again executed %v\nlog:\n%s", again.ran, d.log)
			}
		})
	}
}

// compare checks a build's files: those of a clean build.
func (d *daemon) compare(got outcome) {
	d.t.Helper()
	want := map[string]string{
		"base": "-rw-r--r-- " + strings.Repeat("base", 1000), "one": "-rw-r----- " + strings.Repeat("one", 1000), "two": "-rw-r----- two", "top": "-rw-r----- v",
	}
	if !maps.Equal(got.files, want) {
		d.t.Errorf("got %v, want %v", got.files, want)
	}
}

// A layer that only the registry has may be cut short, changed, refused or slow
// to come at any time: it is asked for again, and nothing wrong gets in.
func TestLostRemote(t *testing.T) {
	for name, misbehave := range map[string]func(d *daemon){
		"deleted": func(d *daemon) {
			d.once(func(w http.ResponseWriter) bool { http.NotFound(w, nil); return true })
		},
		"unreachable": func(d *daemon) {
			d.once(func(http.ResponseWriter) bool { panic(http.ErrAbortHandler) })
		},
		"truncated":   func(d *daemon) { d.lieOnce(func(data []byte) []byte { return data[:len(data)/2] }) },
		"bit flipped": func(d *daemon) { d.lieOnce(func(data []byte) []byte { data[len(data)/2] ^= 1; return data }) },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDaemon(t)
			got := d.build("copy", "v", trouble{mounting: func() { misbehave(d) }})
			d.compare(got)
			// two was made before, so base was there: now nothing is.
			d.must(d.worker.Cache().Prune(t.Context(), cache.PruneOptions{All: true}, nil))
			misbehave(d)
			d.compare(d.build("copy", "v", trouble{}))
		})
	}
}

// once makes one request for a blob end otherwise.
func (d *daemon) once(fn func(w http.ResponseWriter) bool) {
	var done atomic.Bool // requests come side by side
	d.reg.Change(func() {
		d.reg.Before = func(w http.ResponseWriter, req *http.Request) bool {
			return strings.Contains(req.URL.Path, "/base/blobs/") && !done.Swap(true) && fn(w)
		}
	})
}

func (d *daemon) lieOnce(change func([]byte) []byte) {
	var done atomic.Bool
	d.reg.Change(func() {
		d.reg.Lie = func(kind string, data []byte) []byte {
			if kind == "manifest" || done.Swap(true) {
				return data
			}
			return change(slices.Clone(data))
		}
	})
}

// Records that are collected while a build runs, and losses at the same time,
// are misses.
func TestLostDuringCollection(t *testing.T) {
	d := newDaemon(t)
	for i := range 10 {
		d.build("two", "first", trouble{})
		var collecting sync.WaitGroup
		stop := make(chan struct{})
		collecting.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := d.worker.Cache().Prune(context.Background(), cache.PruneOptions{All: true}, nil); err != nil {
					t.Error(err)
					return
				}
			}
		})
		tr := trouble{}
		if i%2 == 0 {
			tr.digesting = d.loseSnapshot("top")
		}
		d.compare(d.build("copy", "v", tr))
		close(stop)
		collecting.Wait()
	}
}
