package build

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/cache/remote"
	"github.com/kilnbuild/kiln/frontend"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/solver"
	"github.com/kilnbuild/kiln/worker/export"
	"github.com/kilnbuild/kiln/worker/remotecache"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// imports are the caches that a build asks, those that frontends name included.
// Each is read once, in the background: what they are asked for waits for them.
type imports struct {
	b       *Build
	reading sync.WaitGroup

	mu     sync.Mutex      // guards the fields below
	known  map[string]bool // by type and attributes
	all    []*remotecache.Import
	closed bool
}

// add makes the build ask a cache, unless it does already. A cache that can't be
// used is told of, and is none.
func (l *imports) add(typ string, attrs map[string]string) {
	id, err := json.Marshal([]any{typ, attrs})
	if err != nil {
		id = []byte(typ) // strings can always be encoded
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.known[string(id)] || l.closed {
		return
	}
	l.known[string(id)] = true
	name := importName(typ, attrs)
	im, err := remotecache.NewImport(l.b.cacheConfig(), name, typ, attrs, l.b.client(), func(err error) { l.failed(name, err) })
	if err == nil {
		l.all = append(l.all, im)
		l.b.solver.AddImport(solver.Import{Name: name, Keys: im, Results: im})
	}
	l.reading.Go(func() {
		vertex := digest.FromString(l.b.req.Ref + "-cache-import-" + string(id))
		err := l.b.vertex(l.b.ctx, vertex, "importing cache manifest from "+name, func(ctx context.Context) error {
			if err != nil {
				return err
			}
			return im.Read(ctx)
		})
		if err != nil && l.b.ctx.Err() == nil {
			l.failed(name, err)
		}
	})
}

func (l *imports) failed(name string, err error) {
	l.b.engine.cfg.Log.Warn("an imported cache is not used", "build", l.b.req.Ref, "import", name, "error", err)
	if l.b.explain != nil {
		l.b.explain.ImportFailed(name, err)
	}
}

// close ends all. The build's context and its solver have ended.
func (l *imports) close() {
	l.mu.Lock()
	l.closed = true
	all := l.all
	l.mu.Unlock()
	l.reading.Wait()
	for _, im := range all {
		im.Close()
	}
}

// importName is what users know an imported cache by.
func importName(kind string, attrs map[string]string) string {
	for _, attr := range []string{"ref", "src", "name"} {
		if v := attrs[attr]; v != "" {
			return kind + " " + v
		}
	}
	return kind
}

func (b *Build) client() remotecache.Client { return remotecache.Client{SessionID: b.req.Session} }

func (b *Build) cacheConfig() remotecache.Config {
	w := b.engine.cfg.Worker
	return remotecache.Config{Cache: w.Cache(), Keys: w.Keys(), Sessions: w.Sessions(), Registry: w.Registry()}
}

// cacheExporters are those of the request, which are found out to make no sense
// before anything runs.
func (b *Build) cacheExporters() ([]*remotecache.Exporter, error) {
	var out []*remotecache.Exporter
	var places []string
	for i, ex := range b.req.CacheExports {
		e, err := remotecache.NewExporter(b.cacheConfig(), ex.Type, ex.Attrs)
		if err != nil {
			return nil, invalid("cache export %d (%s): %v", i, ex.Type, err)
		}
		place := importName(ex.Type, map[string]string{"ref": ex.Attrs["ref"], "src": ex.Attrs["dest"]})
		if slices.Contains(places, place) {
			if e.Inline {
				continue
			}
			return nil, invalid("cache export %d: %s is exported to twice", i, place)
		}
		places, out = append(places, place), append(out, e)
	}
	return out, nil
}

// cacheOf is what there is of res, which src is made of, for those who export the
// cache.
func (b *Build) cacheOf(res *frontend.Result, src export.Source) (*cached, error) {
	c := &cached{b: b}
	if b.steps == nil {
		return c, nil
	}
	add := func(r frontend.Ref, out *cache.Ref) {
		if own, ok := r.(*ref); ok && own.edge.Vertex != nil {
			c.edges, c.refs = append(c.edges, own.edge), append(c.refs, out)
		}
	}
	add(res.Ref, src.Ref)
	for id, r := range res.Refs {
		add(r, src.Refs[id])
	}
	var err error
	if c.steps, err = b.steps.Steps(b.engine.cfg.Worker.Keys(), c.edges); err != nil {
		return nil, fmt.Errorf("look for what the cache has of the build: %w", err)
	}
	return c, nil
}

// cached is what the cache has of a build's result.
type cached struct {
	b     *Build
	edges []solver.Edge
	refs  []*cache.Ref // of edges
	steps []*remote.Step
}

func (c *cached) build(steps []*remote.Step, refs []*cache.Ref) remotecache.Build {
	return remotecache.Build{Client: c.b.client(), Steps: steps, Results: refs, Load: func(ctx context.Context, rec solver.Record) (*cache.Ref, error) {
		res, err := c.b.solver.Load(ctx, rec)
		if err != nil {
			return nil, err
		}
		out, ok := res.(ops.Result)
		if !ok {
			res.Release()
			return nil, fmt.Errorf("internal error: a result of type %T is not a reference", res)
		}
		return out.Ref, nil
	}}
}

// inline makes the cache that goes into the image of ref.
func (c *cached) inline(ctx context.Context, r *cache.Ref) ([]byte, error) {
	i := slices.Index(c.refs, r)
	if i < 0 {
		return nil, nil
	}
	steps, err := c.b.steps.Steps(c.b.engine.cfg.Worker.Keys(), c.edges[i:i+1])
	if err != nil {
		return nil, err
	}
	return remotecache.Inline(ctx, c.build(steps, c.refs[i:i+1]))
}

// exportCaches runs the exporters of the cache side by side, each as a vertex, and
// collects their responses.
func (b *Build) exportCaches(ctx context.Context, exporters []*remotecache.Exporter, c *cached) (map[string]string, error) {
	resp := make([]map[string]string, len(exporters))
	eg, ctx := errgroup.WithContext(ctx)
	for i, e := range exporters {
		if e.Inline {
			continue
		}
		eg.Go(func() error {
			vertex := digest.FromString(fmt.Sprintf("%s-cache-%d", b.req.Session, i))
			err := b.vertex(ctx, vertex, e.Name(), func(ctx context.Context) (err error) {
				resp[i], err = e.Export(ctx, c.build(c.steps, c.refs))
				return err
			})
			if err != nil && e.IgnoreError && ctx.Err() == nil {
				b.engine.cfg.Log.Warn("the cache is not exported", "build", b.req.Ref, "export", e.Name(), "error", err)
				return nil
			}
			return err
		})
	}
	if err := eg.Wait(); err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, r := range resp {
		maps.Copy(out, r)
	}
	return out, nil
}
