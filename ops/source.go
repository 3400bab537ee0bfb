package ops

import (
	"context"
	"fmt"
	"strings"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
)

// sourceCacheType starts what is hashed for the key of every source.
const sourceCacheType = "buildkit.source.v0"

// sourceOp brings something in from outside, through the Source that serves
// its scheme.
type sourceOp struct {
	vertex
	slots
	cache    *cache.Manager
	instance SourceInstance
}

var (
	_ solver.Limiter = (*sourceOp)(nil)
	_ solver.Sharer  = (*sourceOp)(nil)
)

func (l *Loader) newSourceOp(v vertex, op *pb.SourceOp) (*sourceOp, error) {
	scheme, _, ok := strings.Cut(op.Identifier, "://")
	if !ok {
		return nil, invalid("source.identifier", "%q isn't of the form scheme://name", op.Identifier)
	}
	src := l.sources[scheme]
	if src == nil {
		return nil, unsupported("source.identifier", "sources of the scheme %q are not supported by this daemon (supported: %s)", scheme, l.schemes())
	}
	instance, err := src.Resolve(op, v.platform)
	if err != nil {
		return nil, invalid("source", "%w", err)
	}
	return &sourceOp{vertex: v, slots: l.slots, cache: l.cfg.Cache, instance: instance}, nil
}

// CacheMap hashes the source's own key. One that starts with "session:" says
// who is asked, not what is there: its digest is marked as random, so that
// only the content that arrives can match (LLB-158).
func (s *sourceOp) CacheMap(ctx context.Context, asker solver.Asker, index int) (*solver.CacheMap, bool, error) {
	key, more, err := s.instance.CacheKey(ctx, sessionGroup(asker), index)
	if err != nil {
		return nil, false, err
	}
	dgst := digest.FromString(sourceCacheType + ":" + key)
	transient := strings.HasPrefix(key, "session:")
	if transient {
		dgst = digest.Digest("random:" + dgst.Encoded())
	}
	return &solver.CacheMap{Digest: dgst, Transient: transient}, more, nil
}

// SharingKey says with whom a fetch may be shared: with those for whom the
// source asks the same place with the same credentials, if it can tell, and
// otherwise only within the same sessions. So nobody's files or store are read,
// and nobody's credentials are used, for somebody else.
func (s *sourceOp) SharingKey(ctx context.Context, asker solver.Asker) (string, error) {
	g := sessionGroup(asker)
	if shared, ok := s.instance.(SharedSource); ok {
		return shared.SharingKey(ctx, g)
	}
	return sameSessions(g), nil
}

// Exec fetches the source.
func (s *sourceOp) Exec(ctx context.Context, asker solver.Asker, inputs []solver.Result) ([]solver.Result, error) {
	if len(inputs) != 0 {
		return nil, fmt.Errorf("internal error: a source was given %d inputs", len(inputs))
	}
	var ref *cache.Ref
	err := s.cache.WithRoom(ctx, func() (err error) {
		ref, err = s.instance.Fetch(ctx, sessionGroup(asker))
		return err
	})
	if err != nil {
		return nil, err
	}
	return []solver.Result{Result{ref}}, nil
}
