// Package http is the source of downloads: http:// and https:// URLs.
//
// The key of a download is its digest, so it is downloaded when its key is asked
// for, unless the op says the digest. The file is a record that is kept, with
// what the server said of it (answer): the next time the server is asked whether
// that is still so, by ETag or by time, in one conditional request.
//
// Servers aren't trusted: sizes, silences and redirects are bounded, and names
// lead nowhere. Credentials go to the host of the URL alone.
//
// Locks, in the order in which they are taken: instance.turn, that of
// ops.Once, the turn of a place.
package http

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/ops/source/turns"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// DefaultStall is how long a server may be silent by default.
	DefaultStall = 5 * time.Minute
	// DefaultMaxSize is how many bytes a download may have by default.
	DefaultMaxSize = 256 << 30
)

// Options are what a Source works with.
type Options struct {
	Cache    *cache.Manager
	Sessions *session.Manager
	// Stall ends a download in which nothing was heard for so long; 0 is
	// DefaultStall.
	Stall time.Duration
	// MaxSize is in bytes; 0 is DefaultMaxSize.
	MaxSize int64
}

// Source serves http and https.
type Source struct {
	opts   Options
	places turns.Turns
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
	if opts.MaxSize == 0 {
		opts.MaxSize = DefaultMaxSize
	}
	return &Source{opts: opts}
}

// Schemes implements ops.Source.
func (s *Source) Schemes() []string { return []string{"http", "https"} }

// Resolve implements ops.Source.
func (s *Source) Resolve(op *pb.SourceOp, _ ocispec.Platform) (ops.SourceInstance, error) {
	return s.instance(op)
}

func (s *Source) instance(op *pb.SourceOp) (*instance, error) {
	sp, err := parseSpec(op)
	if err != nil {
		return nil, err
	}
	return &instance{Source: s, spec: sp, turn: make(chan struct{}, 1)}, nil
}

// instance is one op.
type instance struct {
	*Source
	spec spec

	turn  chan struct{} // held while reading or setting found
	found *found
}

// found is an answer with the record that holds its file.
type found struct {
	answer
	record string
}

// take waits for the turn.
func (i *instance) take(ctx context.Context) error {
	select {
	case i.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// CacheKey is known without asking anybody if the op says the digest (LLB-111).
func (i *instance) CacheKey(ctx context.Context, g session.Group, index int) (string, bool, error) {
	if index != 0 {
		return "", false, fmt.Errorf("internal error: key %d of %s, which has one", index, i.spec.shown)
	}
	a, err := i.answer(ctx, g)
	if err != nil {
		return "", false, err
	}
	key, err := i.spec.key(a)
	return key, false, err
}

func (i *instance) answer(ctx context.Context, g session.Group) (answer, error) {
	if i.spec.checksum != "" {
		return answer{Digest: i.spec.checksum, Name: i.spec.name(i.spec.offered(nil))}, nil
	}
	ref, f, err := i.get(ctx, g)
	if err != nil {
		return answer{}, err
	}
	ref.Release()
	return f.answer, nil
}

// Fetch returns the file's record.
func (i *instance) Fetch(ctx context.Context, g session.Group) (*cache.Ref, error) {
	ref, _, err := i.get(ctx, g)
	return ref, err
}

// get returns what the server answers: what was found before stays what the op
// stands for. A failure isn't remembered.
func (i *instance) get(ctx context.Context, g session.Group) (*cache.Ref, *found, error) {
	if err := i.take(ctx); err != nil {
		return nil, nil, err
	}
	defer func() { <-i.turn }()
	before := i.found
	if before != nil {
		if ref, err := i.opts.Cache.Get(ctx, before.record); err == nil {
			return ref, before, nil
		}
	}
	ref, f, err := i.once(ctx, g)
	if err != nil {
		return nil, nil, err
	}
	if before != nil && before.Digest != f.Digest {
		ref.Release()
		return nil, nil, fmt.Errorf("the file at %s changed while it was used: its digest was %s and is %s", i.spec.shown, before.Digest, f.Digest)
	}
	i.found = f
	return ref, f, nil
}

// once is download, unless a step of the build has asked the same server the
// same: then the answer is the one that it got, whatever this op wants the file
// to be called and whose it is to be (LLB-117). An op that says the digest needs
// no answer.
func (i *instance) once(ctx context.Context, g session.Group) (ref *cache.Ref, f *found, err error) {
	if i.spec.checksum != "" {
		return i.download(ctx, g)
	}
	q, err := i.spec.question()
	if err != nil {
		return nil, nil, err
	}
	f, err = ops.Once(ctx, g, q, func() (f *found, err error) {
		ref, f, err = i.download(ctx, g)
		return f, err
	})
	if err != nil || ref != nil {
		return ref, f, err
	}
	if ref, f, err := i.reuse(ctx, f); err == nil || ctx.Err() != nil {
		return ref, f, err
	}
	return i.download(ctx, g) // the other op's file is gone
}

// arrive waits for the op's turn at its place and looks for what is known there;
// leave ends both.
func (i *instance) arrive(ctx context.Context) (place string, k known, leave func(), err error) {
	if place, err = i.spec.place(); err != nil {
		return "", nil, nil, err
	}
	done, err := i.places.Take(ctx, place)
	if err != nil {
		return "", nil, nil, err
	}
	k = i.known(ctx, place)
	return place, k, func() {
		k.release()
		done()
	}, nil
}

// download asks the server, unless the file is there that the op names by its
// digest. One at a time does so for a place; who comes later finds what the
// first one got.
func (i *instance) download(ctx context.Context, g session.Group) (*cache.Ref, *found, error) {
	place, known, leave, err := i.arrive(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer leave()
	if want := i.spec.checksum; want != "" {
		for _, k := range known {
			if k.Digest == want {
				return k.ref.Clone(), &k.found, nil
			}
		}
		known = nil // what else there was is of no use
	}
	var ref *cache.Ref
	var f *found
	err = i.opts.Cache.WithRoom(ctx, func() (err error) {
		ref, f, err = i.ask(ctx, g, place, known)
		return err
	})
	if ctx.Err() != nil && err != nil && !errors.Is(err, context.Cause(ctx)) {
		err = context.Cause(ctx)
	}
	return ref, f, err
}

// Facets implements ops.Fingerprinter.
func (i *instance) Facets() []ops.Facet {
	s := &i.spec
	out := []ops.Facet{{Name: "URL", Value: s.shown}, {Name: "attributes of the file", Value: fmt.Sprintf("%s %o %d %d", s.file.Name, s.file.Perm, s.file.UID, s.file.GID)}}
	for _, h := range s.headers {
		out = append(out, ops.Facet{Name: "header " + h.Name, Value: h.Value})
	}
	name := "file at " + s.shown
	if s.checksum != "" {
		return append(out, ops.Facet{Name: name, Value: s.checksum.String()})
	}
	select {
	case i.turn <- struct{}{}:
		defer func() { <-i.turn }()
	default: // somebody asks the server at this moment
		return out
	}
	if i.found != nil {
		out = append(out, ops.Facet{Name: name, Value: i.found.Digest.String()})
		if t := i.found.lastModified(); t != "" {
			out = append(out, ops.Facet{Name: "time of the " + name, Value: t})
		}
	}
	return out
}
