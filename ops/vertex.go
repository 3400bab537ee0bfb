package ops

import (
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
