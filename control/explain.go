package control

import (
	"context"

	"github.com/kilnbuild/kiln/internal/explanation"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// explainServer serves kiln's own service beside the protocol's.
type explainServer struct{ *Server }

// Explain says why the steps of a build ran.
func (s explainServer) Explain(_ context.Context, ref string) (*explanation.Build, error) {
	if s.cfg.Explain == nil {
		return nil, status.Error(codes.Unimplemented, "this daemon doesn't explain builds")
	}
	b, ok := s.cfg.Explain.Get(ref)
	switch {
	case ok:
		return &b, nil
	case ref == "":
		return nil, status.Error(codes.NotFound, "no build has ended yet that could be explained")
	}
	return nil, status.Errorf(codes.NotFound, "build %q: it isn't among the last builds that are kept, has not ended, or never was", ref)
}
