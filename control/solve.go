package control

import (
	"context"

	"github.com/kilnbuild/kiln/control/build"
	control "github.com/moby/buildkit/api/services/control"
)

// Solve runs a build to its end (CTL-010 to -049).
func (s *Server) Solve(ctx context.Context, in *control.SolveRequest) (*control.SolveResponse, error) {
	req, err := build.ParseRequest(in)
	if err != nil {
		return nil, s.cfg.Builds.Refuse(in.Ref, err)
	}
	for _, w := range req.Warnings {
		s.front.Log.Warn("a part of the request has no effect", "build", req.Ref, "what", w)
	}
	resp, err := s.cfg.Builds.Run(ctx, req)
	if err != nil {
		return nil, err
	}
	return &control.SolveResponse{ExporterResponse: resp}, nil
}
