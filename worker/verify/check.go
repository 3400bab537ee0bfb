package verify

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime/debug"
	"slices"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/solver"
)

// nobody asks for what is executed here: no client answers.
type nobody struct{}

func (nobody) Values() []any { return nil }

// skipped says why a hit can't be verified.
type skipped string

func (s skipped) Error() string { return string(s) }

// check is one hit that is being verified, and what it holds until its end.
type check struct {
	*task
	v      *Verifier
	deps   []solver.Dep
	inputs []solver.Result
	// sure is set if the record was made from inputs with the same content: then
	// a difference is not due to an input that was made again since.
	sure bool
	held []solver.Result
}

// check executes t's vertex and compares.
func (v *Verifier) check(ctx context.Context, t *task) (f Finding) {
	f = Finding{At: time.Now(), Step: t.vertex.Name, Vertex: t.vertex.Digest}
	for _, i := range t.indexes() {
		f.Records = append(f.Records, t.hits[i].record.Result)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, maxTime, errTime)
	defer cancel()
	ctx = progress.With(ctx, progress.NewScope(progress.Discard, t.vertex.Digest))
	c := &check{task: t, v: v, sure: true}
	defer c.release()
	defer func() {
		if p := recover(); p != nil {
			f.Outcome, f.Detail = Failed, fmt.Sprintf("internal error: panic: %v\n%s", p, debug.Stack())
		}
	}()
	if err := c.run(ctx, &f); err != nil {
		f.Outcome, f.Detail = Failed, err.Error()
		var skip skipped
		var lost *solver.LostError
		switch {
		case errors.As(err, &skip):
			f.Outcome = Skipped
		case errors.As(err, &lost), errors.Is(err, cache.ErrLost):
			f.Outcome, f.Detail = Skipped, "files are gone"
		}
	}
	return f
}

func (c *check) release() {
	for _, r := range c.held {
		r.Release()
	}
}

func (t *task) indexes() []int { return slices.Sorted(maps.Keys(t.hits)) }

// run sets f's outcome, unless the check can't be carried through.
func (c *check) run(ctx context.Context, f *Finding) error {
	records, err := c.records(ctx)
	if err != nil {
		return err
	}
	if err := c.prepare(ctx); err != nil {
		return err
	}
	first, err := c.execute(ctx)
	if err != nil {
		return err
	}
	var wrong []string
	for _, i := range c.indexes() {
		var d differences
		if err := d.between(ctx, records[i], first[i]); err != nil {
			return err
		}
		if d.count > 0 {
			wrong = append(wrong, records[i].ID())
			f.note(d, "only in the record", "missing from the record")
		}
	}
	if f.Outcome = Equal; len(wrong) == 0 {
		return nil
	}
	if err := wait(ctx, c.v.cfg.Apart); err != nil {
		return err
	}
	second, err := c.execute(ctx)
	if err != nil {
		return err
	}
	return c.judge(ctx, f, first, second, wrong)
}

func wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// judge says why the records named wrong aren't what was made first.
func (c *check) judge(ctx context.Context, f *Finding, first, second map[int]solver.Result, wrong []string) error {
	var d differences
	for _, i := range c.indexes() {
		if err := d.between(ctx, first[i], second[i]); err != nil {
			return err
		}
	}
	switch {
	case d.count > 0:
		f.Outcome, f.Paths, f.More = Nondeterministic, nil, 0
		f.note(d, "in one execution only", "in one execution only")
	case !c.sure:
		f.Outcome = Unsure
	default:
		f.Outcome = Wrong
		f.Forgotten = c.v.forget(c.vertex, wrong)
	}
	return nil
}

// records loads what the vertex was answered with.
func (c *check) records(ctx context.Context) (map[int]solver.Result, error) {
	out := map[int]solver.Result{}
	for i, h := range c.hits {
		r, err := c.load(ctx, h.record.Result)
		if err != nil {
			return nil, err
		}
		out[i] = r
	}
	return out, nil
}

// load holds the result named id until the end.
func (c *check) load(ctx context.Context, id string) (solver.Result, error) {
	r, err := ops.Results{Cache: c.v.cfg.Cache}.Load(ctx, id)
	if errors.Is(err, solver.ErrNoResult) {
		return nil, skipped("the record, or an input, is no longer in the cache")
	}
	if err != nil {
		return nil, err
	}
	c.held = append(c.held, r)
	if !refOf(r).Local() {
		return nil, skipped("the record, or an input, is not on this machine")
	}
	return r, nil
}

func refOf(r solver.Result) *cache.Ref {
	res, _ := r.(ops.Result)
	return res.Ref
}

// prepare gets the vertex's inputs.
func (c *check) prepare(ctx context.Context) error {
	m, _, err := c.op.CacheMap(ctx, nobody{}, 0)
	if err != nil {
		return err
	}
	c.deps = m.Deps
	for i := range c.vertex.Inputs {
		r, sure, err := c.input(ctx, i)
		if err != nil {
			return err
		}
		if prepare := c.deps[i].Prepare; prepare != nil {
			if err := prepare(ctx, nobody{}, r); err != nil {
				return err
			}
		}
		if !sure {
			if sure, err = c.foundByContent(ctx, i, r); err != nil {
				return err
			}
		}
		c.inputs = append(c.inputs, r)
		c.sure = c.sure && sure
	}
	return nil
}

// input loads an input: the result that the build had made of it, or else what
// its keys lead to. It is sure to be what the record was made from if it is the
// only one there is, and older than the record.
func (c *check) input(ctx context.Context, i int) (r solver.Result, sure bool, err error) {
	if id := c.made[i]; id != "" {
		r, err = c.load(ctx, id)
		return r, false, err
	}
	hit := c.hits[c.indexes()[0]]
	var roots []solver.Key
	for _, k := range hit.lookup.Inputs[i] {
		roots = append(roots, k.Key)
	}
	found, err := c.v.cfg.Keys.Lookup(solver.Lookup{Roots: roots})
	if err != nil {
		return nil, false, fmt.Errorf("look up input %d: %w", i, err)
	}
	if len(found.Records) == 0 {
		return nil, false, skipped("the record, or an input, is no longer in the cache")
	}
	best := slices.IndexFunc(found.Records, func(r solver.Record) bool { return !r.CreatedAt.After(hit.record.CreatedAt) })
	r, err = c.load(ctx, found.Records[max(best, 0)].Result)
	return r, best >= 0 && len(found.Records) == 1, err
}

// foundByContent reports whether the content of input i alone, whatever made
// it, leads to the record.
func (c *check) foundByContent(ctx context.Context, i int, r solver.Result) (bool, error) {
	if c.deps[i].Content == nil {
		return false, nil
	}
	content, err := c.deps[i].Content(ctx, nobody{}, r)
	if err != nil {
		return false, err
	}
	hit := c.hits[c.indexes()[0]]
	l := hit.lookup
	l.Inputs = slices.Clone(l.Inputs)
	l.Inputs[i] = []solver.InputKey{{Key: solver.ContentKey(content)}}
	found, err := c.v.cfg.Keys.Lookup(l)
	if err != nil {
		return false, fmt.Errorf("look up by the content of input %d: %w", i, err)
	}
	return slices.ContainsFunc(found.Records, func(r solver.Record) bool { return r.Result == hit.record.Result }), nil
}

// execute runs the op and returns the outputs that there are records of.
func (c *check) execute(ctx context.Context) (map[int]solver.Result, error) {
	if l, ok := c.op.(solver.Limiter); ok {
		release, err := l.Acquire(ctx)
		if err != nil {
			return nil, err
		}
		defer release()
	}
	outputs, err := c.op.Exec(ctx, nobody{}, c.inputs)
	if err != nil {
		solver.ReleaseRemains(err)
		return nil, err
	}
	out := map[int]solver.Result{}
	for i, r := range outputs {
		if r == nil {
			continue
		}
		c.held = append(c.held, r)
		if _, wanted := c.hits[i]; wanted {
			out[i] = r
		}
	}
	for i := range c.hits {
		if out[i] == nil {
			return nil, fmt.Errorf("internal error: the step has no output %d", i)
		}
	}
	return out, nil
}

// forget takes the records, and all that was made of them, out of use.
func (v *Verifier) forget(vertex *solver.Vertex, wrong []string) (forgotten int) {
	var ids []string
	for _, id := range wrong {
		ids = append(ids, v.cfg.Keys.MadeOf(id)...)
	}
	why := fmt.Errorf("executed again, %s made other files", vertex.Name)
	ids = append(ids, v.cfg.Cache.Distrust(ids, why)...)
	slices.Sort(ids)
	ids = slices.Compact(ids)
	if err := v.cfg.Keys.Drop(ids); err != nil {
		v.cfg.Log.Error("forget wrong cache records", "records", ids, "error", err)
	}
	return len(ids)
}
