package local

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/cache/contenthash"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/moby/buildkit/session"
)

const (
	// indexKey finds the copies of a directory.
	indexKey = "local.sharedkey"
	// lookup bounds the wait for a session that is named but not there yet.
	lookup = 5 * time.Second
)

// Fetch brings the copy up to date and returns it. The session that the op
// names is asked first, then those of whoever waits (SES-024, -025).
func (i *instance) Fetch(ctx context.Context, g session.Group) (*cache.Ref, error) {
	if i.session != "" {
		wait, cancel := context.WithTimeout(ctx, lookup)
		c, err := i.opts.Sessions.Get(wait, i.session, false)
		cancel()
		if err == nil {
			ref, err := i.sync(ctx, c)
			if err == nil || !unknownDir(err) {
				return ref, err
			}
		}
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if g == nil {
		return nil, fmt.Errorf("local directory %q: %w", i.name, session.ErrNoActiveSessions)
	}
	var ref *cache.Ref
	err := i.opts.Sessions.Any(ctx, g, func(_ context.Context, _ string, c session.Caller) (err error) {
		ref, err = i.sync(ctx, c)
		return err
	})
	if errors.Is(err, session.ErrNoActiveSessions) {
		return nil, fmt.Errorf("local directory %q: %w", i.name, err)
	}
	return ref, err
}

// sync transfers from one client. If the copy of last time turns out damaged,
// it is dropped and everything is transferred anew.
func (i *instance) sync(ctx context.Context, c session.Caller) (*cache.Ref, error) {
	ref, reused, err := i.attempt(ctx, c)
	var te *treeError
	if reused && errors.As(err, &te) {
		ref, _, err = i.attempt(ctx, c)
	}
	return ref, err
}

// attempt also tells whether it changed the copy of an earlier transfer.
func (i *instance) attempt(ctx context.Context, c session.Caller) (_ *cache.Ref, reused bool, err error) {
	t := &transfer{instance: i, key: i.name + ":" + i.keyHint + ":" + c.SharedKey()}
	if i.metadataOnly {
		t.key += ":metadata"
	}
	defer func() { err = errors.Join(err, t.release(context.WithoutCancel(ctx))) }()
	if err := t.run(ctx, c); err != nil {
		if ctx.Err() != nil {
			return nil, false, context.Cause(ctx)
		}
		return nil, t.reused, i.explain(err)
	}
	ref, err := t.commit(ctx)
	return ref, false, err
}

// transfer is one transfer from one client, compared with the copy of an
// earlier one and, if there is anything to change, written to a record.
type transfer struct {
	*instance
	key string // finds the copies (SES-040)

	base *cache.Ref // the copy compared with, until it is changed; nil is none
	raw  []byte     // its state

	u      *cache.Mutable // what is written; nil if there is nothing to write
	reused bool           // u was base
	view   *snapshot.View
	rec    *contenthash.Recorder
	done   []byte // the state after the transfer

	replaced []string // copies that this one takes the place of
}

// run makes the client's directory the content of base or u.
func (t *transfer) run(ctx context.Context, c session.Caller) error {
	if err := t.compare(ctx); err != nil {
		return err
	}
	old, err := openState(t.raw)
	if err != nil {
		return err
	}
	count := startCount(progress.From(ctx), "transferring "+t.name+":")
	defer count.end()
	sctx, cancel := context.WithCancel(c.Context(ctx))
	defer cancel()
	s, err := t.call(sctx, c)
	if err != nil {
		return err
	}
	r := &receiver{
		old: old, everything: t.everything, progress: count.add,
		open: func() (*place, error) { return t.open(ctx) },
	}
	if t.metadataOnly {
		r.metadata, r.wanted = &listing{}, t.wanted
	}
	if err := r.run(sctx, s); err != nil {
		return err
	}
	if !r.changed && t.base == nil { // an empty directory that wasn't there before
		if _, err := t.open(ctx); err != nil {
			return err
		}
	}
	t.done = r.state.encode()
	return nil
}

// compare picks the newest copy to compare with. One without state is what a
// crash left of a transfer: nobody needs it. A transfer of everything compares
// with nothing, and takes the place of all copies there are.
func (t *transfer) compare(ctx context.Context) error {
	for _, id := range t.opts.Cache.Search(indexKey, t.key) {
		if t.everything {
			t.replaced = append(t.replaced, id)
			continue
		}
		if ref, err := t.opts.Cache.Get(ctx, id); err == nil {
			if raw, ok := ref.Metadata(stateKey); ok && validState(raw) {
				t.base, t.raw = ref, raw
				return nil
			}
			ref.Release()
		}
		if err := t.opts.Cache.Remove(id); err != nil {
			return fmt.Errorf("remove useless copy of local directory: %w", err)
		}
	}
	return nil
}

// open gets the record to change: the one compared with, unless something else
// uses it or it can't be had, or a new one (SES-040).
func (t *transfer) open(ctx context.Context) (*place, error) {
	if t.base != nil {
		id := t.base.ID()
		t.base.Release()
		t.base = nil
		if u, err := t.opts.Cache.GetMutable(ctx, id); err == nil {
			p, err := t.use(ctx, u, nil)
			t.reused = err == nil
			if err == nil || !errors.Is(err, cache.ErrLost) {
				return p, err
			}
			t.u = nil
			if err := u.Discard(ctx); err != nil {
				return nil, fmt.Errorf("remove lost copy of local directory: %w", err)
			}
		}
	}
	u, err := t.opts.Cache.New(ctx, nil, cache.Options{
		Description: "local source for " + t.name,
		Type:        cache.TypeLocal,
		Index:       map[string]string{indexKey: t.key},
		Retain:      true,
	})
	if err != nil {
		return nil, fmt.Errorf("make record for local copy: %w", err)
	}
	return t.use(ctx, u, &oldState{})
}

// use makes u what is changed. other is its state if u isn't what was compared
// with.
func (t *transfer) use(ctx context.Context, u *cache.Mutable, other *oldState) (_ *place, err error) {
	t.u = u
	if t.view, err = u.Open(ctx); err != nil {
		return nil, fmt.Errorf("open local copy: %w", err)
	}
	if t.rec, err = contenthash.NewRecorder(u); err != nil {
		return nil, fmt.Errorf("open content digests of local copy: %w", err)
	}
	return &place{root: t.view.FD(), rec: t.rec, other: other}, nil
}

// commit returns the copy. It is committed, so that it can be used while
// further builds run.
func (t *transfer) commit(ctx context.Context) (*cache.Ref, error) {
	if t.u == nil {
		ref := t.base
		t.base = nil
		return ref, nil
	}
	view := t.view
	t.view = nil
	if err := view.Close(); err != nil {
		return nil, fmt.Errorf("close local copy: %w", err)
	}
	if err := t.rec.Save(t.u); err != nil {
		return nil, fmt.Errorf("save content digests of local directory %q: %w", t.name, err)
	}
	t.u.SetMetadata(stateKey, t.done)
	ref, err := t.u.Commit(ctx)
	if err != nil {
		return nil, fmt.Errorf("commit local directory %q: %w", t.name, err)
	}
	t.u = nil
	for _, id := range t.replaced {
		if err := t.opts.Cache.Remove(id); err != nil {
			ref.Release()
			return nil, fmt.Errorf("remove earlier copy of local directory %q: %w", t.name, err)
		}
	}
	return ref, nil
}

// release drops what a transfer that failed leaves (SES-041).
func (t *transfer) release(ctx context.Context) (err error) {
	if t.base != nil {
		t.base.Release()
	}
	if t.view != nil {
		err = t.view.Close()
	}
	if t.u != nil {
		err = errors.Join(err, t.u.Discard(ctx))
	}
	return err
}

// wanted tells whether a metadata-only transfer brings the file at path.
func (i *instance) wanted(path string) bool {
	if i.excepted == nil {
		return false
	}
	ok, err := i.excepted.MatchesOrParentMatches(path)
	return err == nil && ok
}

// count shows how many bytes came, at most ten times a second.
type count struct {
	scope progress.Scope
	st    progress.Status
	shown time.Time
}

// interval between two shows (SES-042).
const interval = 100 * time.Millisecond

func startCount(scope progress.Scope, id string) *count {
	now := time.Now()
	c := &count{scope: scope, st: progress.Status{ID: id, Name: "transferring", Started: &now}}
	c.show(now)
	return c
}

func (c *count) show(now time.Time) {
	st := c.st
	st.Timestamp, c.shown = now, now
	c.scope.Write(progress.Event{Status: &st})
}

func (c *count) add(bytes int) {
	c.st.Current += int64(bytes)
	if now := time.Now(); now.Sub(c.shown) >= interval {
		c.show(now)
	}
}

func (c *count) end() {
	now := time.Now()
	c.st.Completed = &now
	c.show(now)
}
