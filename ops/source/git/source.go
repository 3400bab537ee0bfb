// Package git is the source of repositories: git://host/path#ref:subdir.
//
// A ref is looked up at the remote once per build, whatever steps use it
// (LLB-117); its commit is the key. What a
// checkout needs is fetched into a bare mirror of the remote, a record that is
// kept and that all builds use one after the other (mirror.go), and the files
// are written to a record of their own (checkout.go).
//
// Remotes and repositories aren't trusted. The program git runs without the
// machine's configuration, hooks and helpers (command.go), names can't be taken
// for options (spec.go), and a subdirectory is never reached through a link.
// Credentials come from the client's session; they are never stored, and never
// in arguments (access.go).
//
// Locks, in the order in which they are taken: instance.turn, those of ops.Once
// for a ref and for its whole name; instance.turn, the turn of a checkout, the
// turn of a mirror.
package git

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/ops/source/turns"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const scheme = "git"

// DefaultStall is how long a remote may be silent by default.
const DefaultStall = 10 * time.Minute

// Options are what a Source works with.
type Options struct {
	Cache    *cache.Manager
	Sessions *session.Manager
	// Stall ends a transfer in which nothing was heard for so long; 0 is
	// DefaultStall.
	Stall time.Duration
}

// Source serves git.
type Source struct {
	opts    Options
	mirrors turns.Turns // by remote
	trees   turns.Turns // by key
	usable  atomic.Bool // git was found to be new enough
}

var (
	_ ops.Source        = (*Source)(nil)
	_ ops.Fingerprinter = (*instance)(nil)
)

// New returns a source.
func New(opts Options) *Source {
	if opts.Stall == 0 {
		opts.Stall = DefaultStall
	}
	return &Source{opts: opts}
}

// Schemes implements ops.Source.
func (s *Source) Schemes() []string { return []string{scheme} }

// Resolve implements ops.Source.
func (s *Source) Resolve(op *pb.SourceOp, _ ocispec.Platform) (ops.SourceInstance, error) {
	return s.instance(op)
}

func (s *Source) instance(op *pb.SourceOp) (*instance, error) {
	_, name, _ := strings.Cut(op.Identifier, "://")
	for _, attr := range unsupported {
		if op.Attrs[attr] != "" {
			return nil, fmt.Errorf("%s is not supported by this daemon", attr)
		}
	}
	sp, err := parseSpec(name, op.Attrs)
	if err != nil {
		return nil, err
	}
	return &instance{Source: s, spec: sp, turn: make(chan struct{}, 1)}, nil
}

// unsupported are the attributes whose capabilities are off: who sets them all
// the same must not get less than was asked for.
var unsupported = []string{
	pb.AttrGitSignatureVerifyPubKey, pb.AttrGitSignatureVerifyRejectExpired,
	pb.AttrGitSignatureVerifyRequireSignedTag, pb.AttrGitSignatureVerifyIgnoreSignedTag,
	pb.AttrGitBundle, pb.AttrGitCheckoutBundle,
}

// instance is one git source op.
type instance struct {
	*Source
	spec spec

	turn  chan struct{} // held while reading or setting found
	found *target
}

// remoteRef is what a build asks remotes about. Who asks with what credentials is
// no part of it: they decide whether there is an answer, not what it is.
type remoteRef struct{ url, ref string }

// target finds out, once, what the ref stands for. A failure isn't remembered.
func (i *instance) target(ctx context.Context, g session.Group) (*target, error) {
	select {
	case i.turn <- struct{}{}:
		defer func() { <-i.turn }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if i.found != nil {
		return i.found, nil
	}
	t, known := i.spec.pinned()
	if !known {
		var err error
		t, err = ops.Once(ctx, g, remoteRef{i.spec.url, i.spec.ref}, func() (*target, error) {
			defer progress.From(ctx).Begin("resolve " + i.spec.url)()
			t, err := i.lookUp(ctx, &i.spec, g)
			if err != nil || t.ref == i.spec.ref {
				return t, err
			}
			// What the build was told of it by its whole name, which is never shorter, stands.
			return ops.Once(ctx, g, remoteRef{i.spec.url, t.ref}, func() (*target, error) { return t, nil })
		})
		if err != nil {
			return nil, err
		}
		if err := i.spec.expects(t); err != nil {
			return nil, err
		}
	}
	i.found = t
	return t, nil
}

// CacheKey is the commit with what is taken of it (LLB-156).
func (i *instance) CacheKey(ctx context.Context, g session.Group, index int) (string, bool, error) {
	if index != 0 {
		return "", false, fmt.Errorf("internal error: key %d of git source %s, which has one", index, i.spec.url)
	}
	t, err := i.target(ctx, g)
	if err != nil {
		return "", false, err
	}
	return i.spec.key(t.identity(&i.spec), t.ref), false, nil
}

// snapshotIndex finds checkouts by their keys.
const snapshotIndex = "git.snapshot"

// Fetch makes the checkout, unless there is one.
func (i *instance) Fetch(ctx context.Context, g session.Group) (*cache.Ref, error) {
	t, err := i.target(ctx, g)
	if err != nil {
		return nil, err
	}
	key := i.spec.key(t.identity(&i.spec), t.ref)
	done, err := i.trees.Take(ctx, key)
	if err != nil {
		return nil, err
	}
	defer done()
	for _, id := range i.opts.Cache.Search(snapshotIndex, key) {
		if ref, err := i.opts.Cache.Get(ctx, id); err == nil {
			return ref, nil
		}
	}
	var ref *cache.Ref
	err = i.withMirror(ctx, &i.spec, t, g, func(m *mirror) (err error) {
		ref, err = i.checkOut(ctx, m, t, key)
		return err
	})
	if err != nil && ref != nil {
		ref.Release()
		ref = nil
	}
	return ref, err
}

// Facets implements ops.Fingerprinter.
func (i *instance) Facets() []ops.Facet {
	s := &i.spec
	out := []ops.Facet{{Name: "repository", Value: s.url}}
	add := func(name, value string) {
		if value != "" {
			out = append(out, ops.Facet{Name: name, Value: value})
		}
	}
	add("directory of the repository", s.subdir)
	add("expected commit", s.checksum)
	for name, set := range map[string]bool{
		"kept .git directory": s.keepDir, "omission of submodules": s.skipSubmodules, "use of the commit's time": s.commitTimes,
	} {
		if set {
			add(name, "true")
		}
	}
	select {
	case i.turn <- struct{}{}:
		defer func() { <-i.turn }()
	default: // somebody asks the remote at this moment
		add("ref", s.ref)
		return out
	}
	if i.found != nil {
		add("commit of "+s.url, i.found.identity(s))
		if s.keepDir {
			add("ref", i.found.ref)
		}
		return out
	}
	add("ref", s.ref)
	return out
}
