package ops

import (
	"context"
	"sync"
	"testing"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"
)

// defBuilder makes definitions by hand.
type defBuilder struct {
	t   testing.TB
	def *pb.Definition
}

func newDef(t testing.TB) *defBuilder {
	return &defBuilder{t: t, def: &pb.Definition{Metadata: map[string]*pb.OpMetadata{}}}
}

// add appends op and returns its digest.
func (b *defBuilder) add(op *pb.Op) digest.Digest {
	b.t.Helper()
	dt, err := proto.MarshalOptions{Deterministic: true}.Marshal(op)
	if err != nil {
		b.t.Fatal(err)
	}
	b.def.Def = append(b.def.Def, dt)
	return digest.FromBytes(dt)
}

func (b *defBuilder) meta(dgst digest.Digest, meta *pb.OpMetadata) {
	b.def.Metadata[string(dgst)] = meta
}

// done points to output index of dgst and returns the definition.
func (b *defBuilder) done(dgst digest.Digest, index int64) *pb.Definition {
	b.add(&pb.Op{Inputs: []*pb.Input{input(dgst, index)}})
	return b.def
}

func input(dgst digest.Digest, index int64) *pb.Input {
	return &pb.Input{Digest: string(dgst), Index: index}
}

func sourceOf(identifier string) *pb.Op {
	return &pb.Op{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: identifier}}}
}

func rootMount() *pb.Mount { return &pb.Mount{Input: 0, Dest: "/", Output: 0} }

func execOf(e *pb.ExecOp, inputs ...*pb.Input) *pb.Op {
	if e.Meta == nil {
		e.Meta = &pb.Meta{Args: []string{"run", "it"}}
	}
	if e.Mounts == nil {
		e.Mounts = []*pb.Mount{rootMount()}
	}
	return &pb.Op{Inputs: inputs, Op: &pb.Op_Exec{Exec: e}}
}

func mergeOf(inputs ...*pb.Input) *pb.Op {
	m := &pb.MergeOp{}
	for i := range inputs {
		m.Inputs = append(m.Inputs, &pb.MergeInput{Input: int64(i)})
	}
	return &pb.Op{Inputs: inputs, Op: &pb.Op_Merge{Merge: m}}
}

// single is the definition whose result is op's output 0.
func single(t testing.TB, op *pb.Op) *pb.Definition {
	b := newDef(t)
	return b.done(b.add(op), 0)
}

// onSource is the definition of op on a source as its one input.
func onSource(t testing.TB, op *pb.Op) *pb.Definition {
	b := newDef(t)
	op.Inputs = []*pb.Input{input(b.add(sourceOf("test://base")), 0)}
	return b.done(b.add(op), 0)
}

var amd64 = ocispec.Platform{OS: "linux", Architecture: "amd64"}

func newTestLoader(t testing.TB, cfg Config) *Loader {
	t.Helper()
	if cfg.Sources == nil {
		cfg.Sources = []Source{&fakeSource{}}
	}
	if cfg.Platform.OS == "" {
		cfg.Platform = amd64
	}
	l, err := NewLoader(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// fakeSource serves test:// with whatever its functions say.
type fakeSource struct {
	key   func(index int) (string, bool, error)
	fetch func(ctx context.Context) (*cache.Ref, error)

	mu       sync.Mutex
	resolved []ocispec.Platform
	groups   [][]string // sessions that Fetch was given
}

func (f *fakeSource) Schemes() []string { return []string{"test", "docker-image"} }

func (f *fakeSource) Resolve(op *pb.SourceOp, p ocispec.Platform) (SourceInstance, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.resolved = append(f.resolved, p)
	return f, nil
}

func (f *fakeSource) CacheKey(_ context.Context, _ session.Group, index int) (string, bool, error) {
	return f.key(index)
}

func (f *fakeSource) Fetch(ctx context.Context, g session.Group) (*cache.Ref, error) {
	f.mu.Lock()
	f.groups = append(f.groups, session.AllSessionIDs(g))
	f.mu.Unlock()
	return f.fetch(ctx)
}

// asker is a fixed set of builds.
type asker []any

func (a asker) Values() []any { return a }

var _ solver.Asker = asker{}
