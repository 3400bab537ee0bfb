package ops

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

// maxDefinition bounds the ops of a definition, in bytes. It is far above what
// a message of the protocol can carry and keeps a definition from elsewhere,
// such as a file in an image, from eating the daemon's memory.
const maxDefinition = 64 << 20

// node is an op on its way to become a vertex.
type node struct {
	digest  digest.Digest
	op      *pb.Op
	meta    *pb.OpMetadata // nil if there is none
	inputs  []*node
	outputs int // known once its vertex is made
	status  nodeStatus
	vertex  *solver.Vertex
}

// nodeStatus is how far the walk in order has come with a node.
type nodeStatus int

const (
	unvisited nodeStatus = iota
	open                 // its inputs are being walked
	ordered              // it has its place
)

// parse turns def into nodes and returns the one that the last op points to,
// with the index of the output. Ops keep the digest of the bytes as received:
// they are never marshalled again (LLB-001).
func parse(def *pb.Definition) (target *node, index int64, err error) {
	if err := checkSize(def); err != nil {
		return nil, 0, err
	}
	if err := checkLocations(def.Source); err != nil {
		return nil, 0, err
	}
	if len(def.Def) == 1 {
		return nil, 0, definitionError(errors.New("it has one op; it needs at least one step and the op that points to it"))
	}
	last := len(def.Def) - 1
	nodes := make(map[digest.Digest]*node, len(def.Def))
	all := make([]*node, 0, len(def.Def))
	for i, raw := range def.Def {
		n := &node{digest: digestOf(raw)}
		if nodes[n.digest] != nil && i != last {
			continue // the same op twice is one vertex
		}
		op := &pb.Op{}
		if err := proto.Unmarshal(raw, op); err != nil {
			return nil, 0, inOp(n.digest, fmt.Errorf("parse op %d of the definition: %w", i, err))
		}
		n.op, n.meta = op, def.Metadata[string(n.digest)]
		all = append(all, n)
		if i != last {
			nodes[n.digest] = n
		}
	}
	for _, n := range all {
		if err := n.connect(nodes); err != nil {
			return nil, 0, inOp(n.digest, err)
		}
	}
	pointer := all[len(all)-1]
	if err := checkPointer(pointer); err != nil {
		return nil, 0, inOp(pointer.digest, err)
	}
	return pointer.inputs[0], pointer.op.Inputs[0].Index, nil
}

// digestOf is digest.FromBytes in a quarter of the time, which counts where
// there are thousands of ops.
func digestOf(raw []byte) digest.Digest {
	const prefix = "sha256:"
	sum := sha256.Sum256(raw)
	text := make([]byte, 0, len(prefix)+2*sha256.Size)
	return digest.Digest(hex.AppendEncode(append(text, prefix...), sum[:]))
}

// ShareMetadata has ops of def whose metadata are equal have the same message: in
// definitions of thousands of ops most are, and a build keeps its definitions to
// its end. Nobody else may use def meanwhile, or change metadata afterwards.
func ShareMetadata(def *pb.Definition) {
	var last *pb.OpMetadata
	for dgst, m := range def.GetMetadata() {
		if m.EqualVT(last) {
			def.Metadata[dgst] = last
		} else {
			last = m
		}
	}
}

func checkSize(def *pb.Definition) error {
	size := 0
	for _, raw := range def.Def {
		size += len(raw)
	}
	if size > maxDefinition {
		return definitionError(fmt.Errorf("its ops take %d bytes; the limit is %d", size, maxDefinition))
	}
	return nil
}

// checkLocations looks only at what would mislead whoever follows a location.
func checkLocations(src *pb.Source) error {
	if src == nil {
		return nil
	}
	for i, info := range src.Infos {
		if info == nil {
			return definitionError(fmt.Errorf("source.infos[%d] is nil", i))
		}
	}
	for dgst, locs := range src.Locations {
		if locs == nil {
			return definitionError(fmt.Errorf("source.locations[%s] is nil", dgst))
		}
		for i, loc := range locs.Locations {
			if loc == nil {
				return definitionError(fmt.Errorf("source.locations[%s][%d] is nil", dgst, i))
			}
			if loc.SourceIndex < 0 || int(loc.SourceIndex) >= len(src.Infos) {
				return definitionError(fmt.Errorf("source.locations[%s][%d]: source index %d is none of the %d sources", dgst, i, loc.SourceIndex, len(src.Infos)))
			}
		}
	}
	return nil
}

// connect finds the nodes that n's inputs name.
func (n *node) connect(nodes map[digest.Digest]*node) error {
	if len(n.op.Inputs) == 0 {
		return nil
	}
	n.inputs = make([]*node, len(n.op.Inputs))
	for i, in := range n.op.Inputs {
		if in.Index < 0 {
			return invalid(fmt.Sprintf("inputs[%d].index", i), "output %d of %s can't be: it is negative", in.Index, in.Digest)
		}
		dep := nodes[digest.Digest(in.Digest)]
		if dep == nil {
			return invalid(fmt.Sprintf("inputs[%d].digest", i), "%q is no op of the definition", in.Digest)
		}
		n.inputs[i] = dep
	}
	return nil
}

// checkPointer holds the last op to what it is for: to name the result.
func checkPointer(n *node) error {
	if n.op.Op != nil {
		return invalid("", "the last op must only point to the result, but it is a step itself")
	}
	if len(n.op.Inputs) == 0 {
		return invalid("inputs", "the last op must point to the result, but it has no input")
	}
	return nil
}

// order returns target and all it needs, inputs before their users. It keeps
// its own stack, so that a definition can be as deep as it is long.
func order(target *node) ([]*node, error) {
	type visit struct {
		n    *node
		next int // the input to walk next
	}
	var out []*node
	target.status = open
	stack := []visit{{n: target}}
	for len(stack) > 0 {
		top := &stack[len(stack)-1]
		if top.next == len(top.n.inputs) {
			top.n.status = ordered
			out = append(out, top.n)
			stack = stack[:len(stack)-1]
			continue
		}
		dep := top.n.inputs[top.next]
		top.next++
		switch dep.status {
		case unvisited:
			dep.status = open
			stack = append(stack, visit{n: dep})
		case open:
			return nil, inOp(dep.digest, invalid("inputs", "it is among its own inputs"))
		case ordered:
		}
	}
	return out, nil
}

func definitionError(err error) error {
	return &DefinitionError{Code: codes.InvalidArgument, Err: err}
}
