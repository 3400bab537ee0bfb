// Package ops gives each LLB op its meaning: Load turns a definition into
// solver vertices, and one file per op holds how it is cached and how it runs.
// Wire types stop here: solver, cache, executor and snapshot never see pb.
//
// Load checks everything that the definition alone decides, so that ops need
// not: what it lets through has every field that its kind needs, and every
// index in it names something. An op is the op with the vertex that it stands
// behind (vertex), the shared limit if it counts (slots), and what it works
// with; it holds no state of its runs, which may overlap.
//
// What file and diff ops do to directory trees is filetree's.
//
// Cache maps are upstream's byte for byte, so that registry caches work both
// ways; key.go, exec_key.go and file_key.go say how.
//
// Locks, in the order in which they are taken: prunedMounts.mu of a build,
// cacheKey.turn (several of them by name), cacheMounts.mu. nesting.mu of a build
// is taken alone. saying.turn is taken by sources, which hold the turn of an op
// then and may take others; sayings.mu is taken alone.
package ops

import (
	"context"
	"log/slog"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Build is the solver.BuildOptions.Value of every build: what ops know of who
// asks.
type Build struct {
	SessionIDs   []string // the build's own session first
	Entitlements map[string]bool

	nesting nesting
	pruned  prunedMounts // cache mounts that ignore-cache steps emptied (LLB-007)
	said    sayings      // by what is outside
}

// Group is b's sessions, for sources that are asked on b's behalf by no op.
func (b *Build) Group() session.Group { return group{alone{b}} }

// alone is a build as the only asker.
type alone struct{ *Build }

func (a alone) Values() []any { return []any{a.Build} }

// sessionGroup gives the sessions of everyone who waits for an answer.
func sessionGroup(asker solver.Asker) session.Group { return group{asker} }

type group struct{ asker solver.Asker }

func (g group) SessionIterator() session.Iterator {
	var ids []string
	for _, v := range g.asker.Values() {
		if b, ok := v.(*Build); ok {
			ids = append(ids, b.SessionIDs...)
		}
	}
	return &iterator{ids}
}

// firstBuild is the build that asks, the first one if there are several; nil if
// there is none.
func firstBuild(asker solver.Asker) *Build {
	for _, v := range asker.Values() {
		if b, ok := v.(*Build); ok {
			return b
		}
	}
	return nil
}

type iterator struct{ ids []string }

func (i *iterator) NextSession() string {
	if len(i.ids) == 0 {
		return ""
	}
	id := i.ids[0]
	i.ids = i.ids[1:]
	return id
}

// Source is a scheme's implementation, such as docker-image.
type Source interface {
	// Schemes are those it serves, such as "docker-image".
	Schemes() []string
	// Resolve checks op and returns what the solver calls. It does no I/O.
	Resolve(op *pb.SourceOp, platform ocispec.Platform) (SourceInstance, error)
}

// SourceInstance is one source op, ready to be asked.
type SourceInstance interface {
	// CacheKey returns the index-th key (before hashing), and whether there
	// are more (LLB-155 to -159).
	CacheKey(ctx context.Context, g session.Group, index int) (key string, more bool, err error)
	// Fetch makes the ref; nil is an empty one.
	Fetch(ctx context.Context, g session.Group) (*cache.Ref, error)
}

// SharedSource is a SourceInstance that one client may fetch for another.
type SharedSource interface {
	SourceInstance
	// SharingKey says which clients may: those for which it is the same. It must
	// cover all that a fetch takes from a session, such as credentials, and
	// where it is sent to.
	SharingKey(ctx context.Context, g session.Group) (string, error)
}

// Config is what ops work with.
type Config struct {
	Cache    *cache.Manager
	Executor executor.Executor
	Sessions *session.Manager
	Sources  []Source
	Platform ocispec.Platform // the default
	// Supervisor runs what may outlive the daemon; nil for nothing.
	Supervisor Supervisor
	// Logs is a directory on the file system that has room for what steps print.
	Logs string
	Log  *slog.Logger // nil discards
	// Parallelism bounds the ops that run at once; 0 is no bound (LLB-035).
	Parallelism int
}
