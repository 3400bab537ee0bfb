package build

import (
	"context"
	"errors"
	"slices"

	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
	spb "github.com/moby/buildkit/sourcepolicy/pb"
	"github.com/opencontainers/go-digest"
)

// nested solves what steps of a definition find to be solved, by the policies
// and limits of the request that brought them.
type nested struct {
	br       *bridge
	policies []*spb.Policy
	limits   ops.Limits
}

// Load implements ops.Nested.
func (n nested) Load(ctx context.Context, def *pb.Definition) (solver.Edge, error) {
	r, err := n.br.load(ctx, def, n.policies, n.limits)
	if err != nil {
		return solver.Edge{}, err
	}
	n.br.mu.Lock()
	defer n.br.mu.Unlock()
	n.br.nested = append(n.br.nested, r.def)
	return r.edge, nil
}

// Solve implements ops.Nested.
func (n nested) Solve(ctx context.Context, e solver.Edge) (solver.Result, error) {
	return n.br.b.solver.Solve(ctx, e)
}

// located is what located says of err, an error about def or about what a step
// of it found to be solved.
func (br *bridge) located(err error, def *pb.Definition) error {
	if failed := (*solver.VertexError)(nil); errors.As(err, &failed) {
		def = br.definitionOf(def, failed.Vertex.Digest)
	}
	return located(err, def)
}

// definitionOf is the definition that has the op: def, or one that a step of it
// found to be solved.
func (br *bridge) definitionOf(def *pb.Definition, op digest.Digest) *pb.Definition {
	br.mu.Lock()
	all := append([]*pb.Definition{def}, br.nested...)
	br.mu.Unlock()
	for _, d := range all {
		if slices.ContainsFunc(d.GetDef(), func(raw []byte) bool { return digest.FromBytes(raw) == op }) {
			return d
		}
	}
	return def
}
