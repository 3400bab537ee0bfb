package build

import (
	"errors"

	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"
)

// located adds to an error about a definition what clients are told of it
// beside its text: the lines of their source that it came from (CTL-082), and
// of a vertex that failed which one it was (CTL-081) and its op (CTL-086).
func located(err error, def *pb.Definition) error {
	var (
		failed *solver.VertexError
		fault  *ops.DefinitionError
	)
	switch {
	case errors.As(err, &failed):
		dgst := failed.Vertex.Digest
		err = &errdefs.SolveError{Solve: failedOp(err, def, dgst), Err: err}
		return withSource(errdefs.WrapVertex(err, dgst), def, dgst)
	case errors.As(err, &fault):
		return withSource(err, def, fault.Op)
	}
	return err
}

// withSource adds the lines of source that the op came from.
func withSource(err error, def *pb.Definition, op digest.Digest) error {
	src := def.GetSource()
	for _, loc := range src.GetLocations()[op.String()].GetLocations() {
		if i := int(loc.SourceIndex); i >= 0 && i < len(src.Infos) {
			err = errdefs.WithSource(err, &errdefs.Source{Info: src.Infos[i], Ranges: loc.Ranges})
		}
	}
	return err
}

// maxOp bounds the op that goes with an error: details travel in trailers,
// which are no place for the content of a file.
const maxOp = 64 << 10

// failedOp describes the op whose bytes have the given digest.
func failedOp(err error, def *pb.Definition, dgst digest.Digest) *errdefs.Solve {
	out := &errdefs.Solve{Description: def.GetMetadata()[dgst.String()].GetDescription()}
	for _, raw := range def.GetDef() {
		if len(raw) > maxOp || digest.FromBytes(raw) != dgst {
			continue
		}
		op := &pb.Op{}
		if proto.Unmarshal(raw, op) == nil { // the loader has read it before
			out.Op = op
		}
	}
	var left *solver.Remains
	if errors.As(err, &left) {
		out.InputIDs, out.MountIDs = resultIDs(left.Inputs), resultIDs(left.Left)
	}
	var action *ops.FileActionError
	if errors.As(err, &action) {
		out.Subject = &errdefs.Solve_File{File: &errdefs.FileAction{Index: int64(action.Index)}}
	}
	return out
}

// resultIDs names results, for the client to mount (GW-064).
func resultIDs(list []solver.Result) []string {
	ids := make([]string, len(list))
	for i, r := range list {
		ids[i] = resultID(r)
	}
	return ids
}
