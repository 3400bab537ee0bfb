package build

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/frontend"
	"github.com/kilnbuild/kiln/worker/export"
	"github.com/kilnbuild/kiln/worker/remotecache"
	"github.com/moby/buildkit/session"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// deliver exports what res stands for. If a result or a blob of it is lost, that
// is made again, and the exporters that aren't through start over: what a client
// has got can't be sent again.
func (b *Build) deliver(exporters []export.Exporter, caches []*remotecache.Exporter, res *frontend.Result) (map[string]string, error) {
	done := make([]export.Done, len(exporters))
	through := make([]bool, len(exporters))
	for losses := 0; ; losses++ {
		src, release, err := b.force(res)
		if err != nil {
			return nil, err
		}
		resp, err := b.deliverOnce(exports{exporters, done, through}, caches, res, src)
		again := errors.Is(err, cache.ErrLost) && losses < maxLosses && b.ctx.Err() == nil
		if again {
			b.loseLost(res, err)
		}
		release()
		if !again {
			return resp, err
		}
	}
}

// exports are exporters, and what those that are through have made.
type exports struct {
	exporters []export.Exporter
	done      []export.Done
	through   []bool
}

func (b *Build) deliverOnce(exports exports, caches []*remotecache.Exporter, res *frontend.Result, src export.Source) (map[string]string, error) {
	what, err := b.cacheOf(res, src)
	if err != nil {
		return nil, err
	}
	if slices.ContainsFunc(caches, func(c *remotecache.Exporter) bool { return c.Inline }) {
		src.Inline = what.inline
	}
	return b.export(exports, src, func(ctx context.Context) (map[string]string, error) {
		return b.exportCaches(ctx, caches, what)
	})
}

// loseLost gives up the results of res that are lost. There may be none: a blob
// that is lost is made again from the files.
func (b *Build) loseLost(res *frontend.Result, why error) {
	for _, r := range append(slices.Collect(maps.Values(res.Refs)), res.Ref) {
		if own, ok := r.(*ref); ok {
			own.loseIfLost(why)
		}
	}
}

// force solves every ref of res, side by side. release gives back what src
// holds.
func (b *Build) force(res *frontend.Result) (src export.Source, release func(), err error) {
	src.Metadata = res.Metadata
	var mu sync.Mutex // guards src and held
	var held []*cache.Ref
	release = func() {
		for _, r := range held {
			r.Release()
		}
	}
	eg, ctx := errgroup.WithContext(b.ctx)
	solve := func(r frontend.Ref, set func(*cache.Ref)) {
		eg.Go(func() error {
			out, err := b.bridge.solved(ctx, r)
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			held = append(held, out)
			set(out)
			return nil
		})
	}
	if res.Refs != nil {
		src.Refs = make(map[string]*cache.Ref, len(res.Refs))
		for k, r := range res.Refs {
			solve(r, func(out *cache.Ref) { src.Refs[k] = out })
		}
	} else {
		solve(res.Ref, func(out *cache.Ref) { src.Ref = out })
	}
	if err := eg.Wait(); err != nil {
		release()
		return export.Source{}, nil, err
	}
	return src, release, nil
}

// export runs every exporter side by side, then what each of them left for the
// end, and beside that last, which finds the layers made, and collects their
// responses (CTL-041, EXP-007). A loss that one of them meets stops no other.
func (b *Build) export(ex exports, src export.Source, last func(context.Context) (map[string]string, error)) (map[string]string, error) {
	resp := map[string]string{}
	for k, v := range src.Metadata {
		if strings.HasPrefix(k, "frontend.") {
			resp[k] = string(v)
		}
	}
	err := b.eachExporter(b.ctx, ex.exporters, func(ctx context.Context, i int) (err error) {
		ex.done[i], err = ex.exporters[i].Export(ctx, src, export.Request{
			SessionID: b.req.Session, Group: session.NewGroup(b.req.Session), Index: i,
		})
		ex.through[i] = err == nil && ex.done[i].Finalize == nil
		return err
	}, func(i int) bool { return ex.through[i] })
	if err != nil {
		return nil, err
	}
	eg, ctx := errgroup.WithContext(b.ctx)
	eg.Go(func() error {
		return b.eachExporter(ctx, ex.exporters, func(ctx context.Context, i int) error {
			return ex.done[i].Finalize(ctx)
		}, func(i int) bool { return ex.done[i].Finalize == nil })
	})
	var more map[string]string
	eg.Go(func() (err error) {
		more, err = last(ctx)
		return err
	})
	if err := eg.Wait(); err != nil {
		return nil, err
	}
	results := map[int]ocispec.Descriptor{}
	for i, d := range ex.done {
		maps.Copy(resp, d.Response)
		if d.Descriptor != nil {
			results[i] = *d.Descriptor
		}
	}
	maps.Copy(resp, more)
	b.mu.Lock()
	b.outcome.Results = results
	b.mu.Unlock()
	return resp, nil
}

// eachExporter runs fn for every exporter side by side, as that exporter's
// vertex, but those that skip leaves out. What is lost for one is reported when
// the others have ended.
func (b *Build) eachExporter(ctx context.Context, exporters []export.Exporter, fn func(ctx context.Context, i int) error, skip func(i int) bool) error {
	eg, ctx := errgroup.WithContext(ctx)
	lost := make([]error, len(exporters))
	for i, ex := range exporters {
		if skip(i) {
			continue
		}
		eg.Go(func() error {
			err := b.vertex(ctx, b.exportDigest(i), ex.Name(), func(ctx context.Context) error { return fn(ctx, i) })
			if errors.Is(err, cache.ErrLost) {
				lost[i], err = err, nil
			}
			return err
		})
	}
	if err := eg.Wait(); err != nil {
		return err
	}
	return errors.Join(lost...)
}

// exportDigest identifies the vertex of an export (CTL-048).
func (b *Build) exportDigest(i int) digest.Digest {
	return digest.FromString(fmt.Sprintf("%s-export-%d", b.req.Session, i))
}
