package ops

import (
	"context"
	"fmt"
	"slices"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// rewritesAtOnce bounds the sources that a rewrite asks about at the same time.
const rewritesAtOnce = 8

// Rewrite gives source a look at every source op that def's result needs, to
// change it in place or refuse it. If it reports a change of any, the definition
// returned is another one: with the digests that the ops, and all that stands on
// them, have now (LLB-002), and their metadata and locations. An error names the
// op.
func Rewrite(ctx context.Context, def *pb.Definition, source func(ctx context.Context, op *pb.Op) (changed bool, err error)) (*pb.Definition, error) {
	target, index, err := parse(def)
	if err != nil {
		return nil, err
	}
	nodes, err := order(target)
	if err != nil {
		return nil, err
	}
	changed := make([]bool, len(nodes))
	eg, ctx := errgroup.WithContext(ctx)
	eg.SetLimit(rewritesAtOnce)
	for i, n := range nodes {
		if n.op.GetSource() == nil {
			continue
		}
		eg.Go(func() (err error) {
			if changed[i], err = source(ctx, n.op); err != nil {
				return &DefinitionError{Op: n.digest, Code: status.Code(err), Err: err}
			}
			return nil
		})
	}
	if err := eg.Wait(); err != nil {
		return nil, err
	}
	if !slices.Contains(changed, true) {
		return def, nil
	}
	out := newRedigested(def)
	for i, n := range nodes {
		if err := out.add(n.op, n.digest, n.meta, changed[i]); err != nil {
			return nil, err
		}
	}
	pointer := &pb.Op{Inputs: []*pb.Input{{Digest: string(target.digest), Index: index}}}
	return out.def, out.add(pointer, "", nil, true)
}

// redigested is a definition with some ops changed.
type redigested struct {
	from, def *pb.Definition
	raw       map[digest.Digest][]byte // ops as they were
	now       map[string]string        // digests, by what they were
}

func newRedigested(from *pb.Definition) *redigested {
	r := &redigested{from: from, raw: map[digest.Digest][]byte{}, now: map[string]string{}}
	r.def = &pb.Definition{Metadata: map[string]*pb.OpMetadata{}}
	for _, raw := range from.Def {
		r.raw[digestOf(raw)] = raw
	}
	if src := from.Source; src != nil {
		r.def.Source = &pb.Source{Infos: src.Infos, Locations: map[string]*pb.Locations{}}
	}
	return r
}

// add appends op, whose inputs have been added. Ops that nothing has changed of
// keep their bytes, and so their digest.
func (r *redigested) add(op *pb.Op, was digest.Digest, meta *pb.OpMetadata, changed bool) error {
	for _, in := range op.Inputs {
		if now := r.now[in.Digest]; now != in.Digest {
			in.Digest, changed = now, true
		}
	}
	raw := r.raw[was]
	if changed {
		var err error
		if raw, err = (proto.MarshalOptions{Deterministic: true}).Marshal(op); err != nil {
			return inOp(was, fmt.Errorf("marshal an op that has been changed: %w", err))
		}
	}
	is := string(digestOf(raw))
	r.now[string(was)], r.def.Def = is, append(r.def.Def, raw)
	if meta != nil {
		r.def.Metadata[is] = meta
	}
	if locs := r.from.Source.GetLocations()[string(was)]; locs != nil {
		r.def.Source.Locations[is] = locs
	}
	return nil
}
