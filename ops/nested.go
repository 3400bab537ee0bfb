package ops

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"

	"github.com/kilnbuild/kiln/internal/files"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"
)

const (
	// maxNestedDefinition bounds the file that a nested build is read from: what a
	// message of the protocol carries.
	maxNestedDefinition = 16 << 20
	// maxNesting bounds how deep builds are nested.
	maxNesting = 32
)

// Nested solves definitions that steps find in their inputs, on the terms of the
// request that brought the steps.
type Nested interface {
	// Load makes def a part of the build's graph.
	Load(ctx context.Context, def *pb.Definition) (solver.Edge, error)
	// Solve returns the result of what Load returned. The caller releases it.
	Solve(ctx context.Context, e solver.Edge) (solver.Result, error)
}

// nestedOp solves the definition in a file of its input, in the build that asks:
// its result is the definition's (LLB-082).
type nestedOp struct {
	vertex
	op     *pb.BuildOp
	nested Nested
}

var _ solver.Sharer = (*nestedOp)(nil)

// definitionInput is the one that the definition is in.
func definitionInput(op *pb.BuildOp) int { return int(op.Inputs[pb.LLBDefinitionInput].Input) }

func checkNested(op *pb.BuildOp, inputs int) (outputs int, err error) {
	if op == nil {
		return 0, invalid("build", "it is missing")
	}
	if op.Builder != int64(pb.LLBBuilder) {
		return 0, invalid("build.builder", "it is %d; only %d is allowed, which solves LLB", op.Builder, pb.LLBBuilder)
	}
	in := op.Inputs[pb.LLBDefinitionInput]
	if in == nil {
		return 0, invalid("build.inputs", "none is named %s, which has the definition", pb.LLBDefinitionInput)
	}
	if in.Input < 0 || in.Input >= int64(inputs) {
		return 0, invalid("build.inputs["+pb.LLBDefinitionInput+"]", "%d is none of its %d inputs", in.Input, inputs)
	}
	return 1, nil
}

func (l *Loader) newNestedOp(v vertex, op *pb.BuildOp, nested Nested) (*nestedOp, error) {
	if nested == nil {
		return nil, unsupported("build", "a definition can't be solved inside this one")
	}
	return &nestedOp{vertex: v, op: op, nested: nested}, nil
}

func (n *nestedOp) CacheMap(context.Context, solver.Asker, int) (*solver.CacheMap, bool, error) {
	m, more, err := definitionKey(struct {
		Type string
		Exec *pb.BuildOp
	}{"buildkit.build.v0", n.op}, len(n.pb.Inputs))
	if err == nil {
		m.Deps[definitionInput(n.op)].Prepare = extract
	}
	return m, more, err
}

// SharingKey is another one in every build: the steps of the definition are the
// build's own, and share by themselves what they can.
func (n *nestedOp) SharingKey(_ context.Context, asker solver.Asker) (string, error) {
	return fmt.Sprintf("build %p", firstBuild(asker)), nil
}

// Exec takes no slot of the limit: the steps that it waits for need them.
func (n *nestedOp) Exec(ctx context.Context, asker solver.Asker, inputs []solver.Result) ([]solver.Result, error) {
	b := firstBuild(asker)
	if b == nil {
		return nil, fmt.Errorf("internal error: no build waits for a nested one")
	}
	i := definitionInput(n.op)
	def, err := n.definition(ctx, inputs[i])
	if err != nil {
		return nil, lostInput(i, err)
	}
	edge, err := n.nested.Load(ctx, def)
	if err != nil {
		return nil, fmt.Errorf("definition in %s: %w", n.fileName(), err)
	}
	if err := b.nesting.enter(n.digest, edge.Vertex); err != nil {
		return nil, fmt.Errorf("definition in %s: %w", n.fileName(), err)
	}
	res, err := n.nested.Solve(ctx, edge)
	if err != nil {
		return nil, err
	}
	return []solver.Result{res}, nil
}

func (n *nestedOp) fileName() string {
	if name, ok := n.op.Attrs[pb.AttrLLBDefinitionFilename]; ok {
		return name
	}
	return pb.LLBDefaultDefinitionFile
}

// definition reads the file. What isn't regular is never opened: it could do
// anything.
func (n *nestedOp) definition(ctx context.Context, input solver.Result) (def *pb.Definition, err error) {
	ref, err := refOf(input)
	if err != nil {
		return nil, err
	}
	name := n.fileName()
	if ref == nil {
		return nil, fmt.Errorf("read the definition %s: its input is empty", name)
	}
	view, err := ref.Open(ctx)
	if err != nil {
		return nil, err
	}
	defer view.Close()
	found, err := view.Resolve(name)
	if err != nil {
		return nil, fmt.Errorf("read the definition: %w", err)
	}
	defer found.Close()
	st, err := found.Stat()
	switch {
	case err != nil:
		return nil, fmt.Errorf("read the definition %s: %w", name, err)
	case !st.Mode().IsRegular():
		return nil, fmt.Errorf("read the definition %s: it is not a regular file but %s", name, st.Mode())
	case st.Size() > maxNestedDefinition:
		return nil, fmt.Errorf("read the definition %s: it has %d bytes; the limit is %d", name, st.Size(), maxNestedDefinition)
	}
	f, err := os.Open(files.Path(int(found.Fd())))
	if err != nil {
		return nil, fmt.Errorf("read the definition %s: %w", name, err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxNestedDefinition))
	if err != nil {
		return nil, fmt.Errorf("read the definition %s: %w", name, err)
	}
	def = &pb.Definition{}
	if err := proto.Unmarshal(text, def); err != nil {
		return nil, fmt.Errorf("read the definition %s: it is no marshalled LLB: %w", name, err)
	}
	if len(def.Def) == 0 {
		return nil, fmt.Errorf("read the definition %s: it is empty", name)
	}
	return def, nil
}

// nesting is what nested builds of one build wait for. The zero value is empty.
type nesting struct {
	mu    sync.Mutex // guards the fields below
	below map[digest.Digest][]digest.Digest
	depth map[digest.Digest]int
}

// enter notes that the nested build outer will wait for target. It refuses what
// would wait for itself, and what is nested too deep.
func (n *nesting) enter(outer digest.Digest, target *solver.Vertex) error {
	inner := nestedBelow(target)
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.below == nil {
		n.below, n.depth = map[digest.Digest][]digest.Digest{}, map[digest.Digest]int{}
	}
	n.below[outer] = inner
	if n.waitsLocked(outer) {
		return fmt.Errorf("op %s: it is among its own steps", outer)
	}
	for _, d := range inner {
		n.depth[d] = max(n.depth[d], n.depth[outer]+1)
		if n.depth[d] > maxNesting {
			return fmt.Errorf("op %s: builds are nested deeper than %d", d, maxNesting)
		}
	}
	return nil
}

// waitsLocked reports whether d waits for itself.
func (n *nesting) waitsLocked(d digest.Digest) bool {
	seen := map[digest.Digest]bool{}
	for todo := slices.Clone(n.below[d]); len(todo) > 0; {
		next := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if next == d {
			return true
		}
		if !seen[next] {
			seen[next] = true
			todo = append(todo, n.below[next]...)
		}
	}
	return false
}

// nestedBelow lists the nested builds that v may wait for.
func nestedBelow(v *solver.Vertex) (out []digest.Digest) {
	seen := map[*solver.Vertex]bool{}
	for todo := []*solver.Vertex{v}; len(todo) > 0; {
		v := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if seen[v] {
			continue
		}
		seen[v] = true
		if _, ok := v.Op.(*nestedOp); ok {
			out = append(out, v.Digest)
		}
		for _, in := range v.Inputs {
			todo = append(todo, in.Vertex)
		}
	}
	return out
}
