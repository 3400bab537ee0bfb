package llb

import (
	"crypto/rand"
	_ "crypto/sha256" // digests are made with it
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"
)

// vertex is an operation that is not yet written down.
type vertex interface {
	// marshal makes the op and its own constraints. It takes its inputs by
	// calling m.addInput in the order in which the op lists them.
	marshal(m *marshaller) (*pb.Op, Constraints, error)
}

// output is one of the file systems that a vertex makes.
type output struct {
	vertex   vertex
	index    func() (int64, error) // nil is index 0
	platform *ocispec.Platform     // set if the vertex was given one
	later    func() (State, error) // see Defer; vertex is nil then
}

// Defer returns a state whose file system f decides when it is first marshalled
// (once per Marshal). Its settings are those of Scratch.
func Defer(f func() (State, error)) State {
	return newState(&output{later: f})
}

// Marshal writes the graph that makes s as a definition. Scratch gives an
// empty one. Options apply to every operation that doesn't say otherwise.
func (s State) Marshal(opts ...ConstraintsOpt) (*pb.Definition, error) {
	m := &marshaller{
		defaults: newConstraints(opts),
		done:     map[vertex]digest.Digest{},
		known:    map[digest.Digest]metadata{},
		decided:  map[*output]*output{},
	}
	if m.defaults.platform == nil {
		p := platforms.Normalize(platforms.DefaultSpec())
		m.defaults.platform = &p
	}
	if m.defaults.localID == "" {
		m.defaults.localID = strings.ToLower(rand.Text())
	}

	target, err := m.input(s.out)
	if err != nil {
		return nil, err
	}
	if target == nil {
		return &pb.Definition{}, nil
	}
	return m.definition(target)
}

// marshaller writes one definition. Every op comes after its inputs and once
// per digest.
type marshaller struct {
	defaults Constraints
	ops      [][]byte
	done     map[vertex]digest.Digest
	known    map[digest.Digest]metadata // of the ops written so far
	decided  map[*output]*output        // of Defer
	sources  sourceCollector
}

// input returns the reference to o, having written what it depends on. It is
// nil for scratch.
func (m *marshaller) input(o *output) (*pb.Input, error) {
	for o != nil && o.later != nil {
		next, ok := m.decided[o]
		if !ok {
			st, err := o.later()
			if err != nil {
				return nil, err
			}
			next = st.out
			m.decided[o] = next
		}
		o = next
	}
	if o == nil {
		return nil, nil
	}
	if d, ok := o.vertex.(*definition); ok {
		return m.include(d)
	}
	dgst, err := m.write(o.vertex)
	if err != nil {
		return nil, err
	}
	in := &pb.Input{Digest: string(dgst)}
	if o.index != nil {
		if in.Index, err = o.index(); err != nil {
			return nil, err
		}
	}
	return in, nil
}

// addInput makes o an input of op and returns its index there, or pb.Empty for
// scratch. If o is an input already, that one serves.
func (m *marshaller) addInput(op *pb.Op, o *output) (int64, error) {
	in, err := m.input(o)
	if err != nil {
		return 0, err
	}
	if in == nil {
		return int64(pb.Empty), nil
	}
	for i, old := range op.Inputs {
		if in.EqualVT(old) {
			return int64(i), nil
		}
	}
	op.Inputs = append(op.Inputs, in)
	return int64(len(op.Inputs) - 1), nil
}

// write writes the op of v after its inputs.
func (m *marshaller) write(v vertex) (digest.Digest, error) {
	if dgst, ok := m.done[v]; ok {
		return dgst, nil
	}
	op, c, err := v.marshal(m)
	if err != nil {
		return "", err
	}
	op.Constraints = &pb.WorkerConstraints{Filter: append(append([]string(nil), m.defaults.filters...), c.filters...)}
	dt, err := proto.MarshalOptions{Deterministic: true}.Marshal(op)
	if err != nil {
		return "", fmt.Errorf("marshal op: %w", err)
	}
	dgst := m.append(dt, c.meta.over(m.defaults.meta))
	m.sources.add(dgst, c.locations)
	m.done[v] = dgst
	return dgst, nil
}

// append adds the bytes of an op, unless it is there already, and its metadata.
func (m *marshaller) append(dt []byte, md metadata) digest.Digest {
	dgst := digest.FromBytes(dt)
	old, ok := m.known[dgst]
	if !ok {
		m.ops = append(m.ops, dt)
	}
	m.known[dgst] = md.over(old)
	return dgst
}

// platform returns the op platform for the first choice that is set, or the
// default.
func (m *marshaller) platform(choices ...*ocispec.Platform) *pb.Platform {
	for _, p := range append(choices, m.defaults.platform) {
		if p != nil {
			return &pb.Platform{
				OS:           p.OS,
				Architecture: p.Architecture,
				Variant:      p.Variant,
				OSVersion:    p.OSVersion,
				OSFeatures:   append([]string(nil), p.OSFeatures...),
			}
		}
	}
	return nil
}

// definition ends the definition with the pointer to its target.
func (m *marshaller) definition(target *pb.Input) (*pb.Definition, error) {
	def := &pb.Definition{Metadata: map[string]*pb.OpMetadata{}, Source: m.sources.toPB()}

	var last Constraints
	last.need(pb.CapConstraints, pb.CapPlatform)
	for dgst, md := range m.known {
		def.Metadata[string(dgst)] = md.toPB()
		if md.ignoreCache {
			last.need(pb.CapMetaIgnoreCache)
		}
		if md.description != nil {
			last.need(pb.CapMetaDescription)
		}
		if md.exportCache != nil {
			last.need(pb.CapMetaExportCache)
		}
	}

	dt, err := (&pb.Op{Inputs: []*pb.Input{target}}).MarshalVT()
	if err != nil {
		return nil, fmt.Errorf("marshal target: %w", err)
	}
	def.Def = append(m.ops, dt)
	def.Metadata[string(digest.FromBytes(dt))] = last.meta.toPB()
	return def, nil
}

// Head returns the digest of the op that def is about, or "" if def is empty.
func Head(def *pb.Definition) (digest.Digest, error) {
	in, err := target(def)
	if err != nil || in == nil {
		return "", err
	}
	return digest.Digest(in.Digest), nil
}

// target returns what the last op of def points to, or nil if def is empty.
func target(def *pb.Definition) (*pb.Input, error) {
	if len(def.GetDef()) == 0 {
		return nil, nil
	}
	var last pb.Op
	if err := last.UnmarshalVT(def.Def[len(def.Def)-1]); err != nil {
		return nil, fmt.Errorf("parse last op of definition: %w", err)
	}
	if len(last.Inputs) == 0 || last.Inputs[0] == nil {
		return nil, errors.New("last op of definition has no input")
	}
	return last.Inputs[0], nil
}

// WriteTo writes def as clients such as "buildctl build" read it.
func WriteTo(def *pb.Definition, w io.Writer) error {
	dt, err := proto.MarshalOptions{Deterministic: true}.Marshal(def)
	if err != nil {
		return fmt.Errorf("marshal definition: %w", err)
	}
	_, err = w.Write(dt)
	return err
}

// ReadFrom reads what WriteTo wrote.
func ReadFrom(r io.Reader) (*pb.Definition, error) {
	dt, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	def := &pb.Definition{}
	if err := def.UnmarshalVT(dt); err != nil {
		return nil, fmt.Errorf("parse definition: %w", err)
	}
	return def, nil
}
