package ops

import (
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// vertex is what every op knows of the vertex it stands behind. Ops embed it.
type vertex struct {
	pb          *pb.Op
	digest      digest.Digest // of the op's bytes
	name        string        // as clients show it
	description map[string]string
	platform    ocispec.Platform // normalised
	ignoreCache bool
}

// Describe returns the op in the protocol's terms, and the description that
// came with it, for typed errors and provenance.
func (v *vertex) Describe() (*pb.Op, map[string]string) { return v.pb, v.description }

// Describe returns what v was loaded from: the op and its description. Both
// are nil for a vertex that Load didn't make. They must not be changed.
func Describe(v *solver.Vertex) (op *pb.Op, description map[string]string) {
	if d, ok := v.Op.(interface {
		Describe() (*pb.Op, map[string]string)
	}); ok {
		return d.Describe()
	}
	return nil, nil
}
