package ops

import (
	"context"

	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
)

// passthroughOp hands inputs on as outputs; it is there to be a vertex of its
// own (LLB-083).
type passthroughOp struct {
	vertex
	op *pb.PassthroughOp
}

func (p *passthroughOp) CacheMap(context.Context, solver.Asker, int) (*solver.CacheMap, bool, error) {
	return definitionKey(struct {
		Type        string
		Passthrough *pb.PassthroughOp
	}{"buildkit.passthrough.v0", p.op}, len(p.pb.Inputs))
}

func (p *passthroughOp) Exec(_ context.Context, _ solver.Asker, inputs []solver.Result) ([]solver.Result, error) {
	all, err := refs(inputs)
	if err != nil {
		return nil, err
	}
	for _, input := range p.op.Outputs {
		if err := wholeInput(int(input), all[input]); err != nil {
			return nil, err
		}
	}
	out := make([]solver.Result, len(p.op.Outputs))
	for i, input := range p.op.Outputs {
		out[i] = inputs[input].Clone()
	}
	return out, nil
}
