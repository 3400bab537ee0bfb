package dockerfile

import (
	"context"
	"errors"

	"github.com/kilnbuild/kiln/client/llb"
	"github.com/kilnbuild/kiln/frontend"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
)

// Frontend converts Dockerfiles. The zero value is ready; it holds no state
// and may serve many requests at once.
type Frontend struct{}

var _ frontend.Frontend = Frontend{}

// Solve serves one request. Errors that have a place in the Dockerfile carry
// it as an errdefs.Source.
func (f Frontend) Solve(ctx context.Context, bridge frontend.Bridge, req frontend.Request) (_ *frontend.Result, err error) {
	b := &build{Frontend: f, bridge: bridge, req: req, metas: metaCache{bridge: bridge}}
	if b.cfg, err = parseConfig(req.Opts, bridge.Platforms()); err != nil {
		return nil, err
	}
	forwardable, capsErr := checkCaps(req.Opts["frontend.caps"])
	if capsErr != nil && !forwardable {
		return nil, capsErr
	}
	if err := b.openContext(ctx); err != nil {
		return nil, err
	}
	if err := b.readDockerfile(ctx); err != nil {
		return nil, err
	}
	if res, ok, err := b.forward(ctx); ok {
		return res, err
	}
	if capsErr != nil {
		return nil, capsErr
	}
	if id, ok := req.Opts["requestid"]; ok {
		return b.answer(ctx, id)
	}
	res, err := b.solvePlatforms(ctx)
	return res, b.withSources(err)
}

// build is one request being served.
type build struct {
	Frontend
	bridge frontend.Bridge
	req    frontend.Request
	cfg    *config
	metas  metaCache

	context    buildContext
	file       *llb.SourceMap // the Dockerfile
	fileVertex digest.Digest  // the op that it came from; warnings hang on it
	ignore     ignoreFile
}

// session is the session that a local directory of the client is read from.
func (b *build) session(local string) string {
	if id, ok := b.cfg.localSessions[local]; ok {
		return id
	}
	return b.req.SessionID
}

// solve makes a lazy reference of st. A scratch state gives nil.
func (b *build) solve(ctx context.Context, st llb.State) (frontend.Ref, *pb.Definition, error) {
	def, err := st.Marshal()
	if err != nil {
		return nil, nil, err
	}
	ref, err := b.solveDefinition(ctx, frontend.SolveRequest{Definition: def})
	return ref, def, err
}

func (b *build) solveDefinition(ctx context.Context, req frontend.SolveRequest) (frontend.Ref, error) {
	if len(req.Definition.Def) == 0 {
		return nil, nil
	}
	res, err := b.bridge.Solve(ctx, req)
	if err != nil {
		return nil, err
	}
	if len(res.Refs) > 0 {
		return nil, errors.New("internal error: one definition was solved to several references")
	}
	return res.Ref, nil
}

// withSources attaches the Dockerfile to the locations in err.
func (b *build) withSources(err error) error {
	var located *parser.LocationError
	if !errors.As(err, &located) {
		return err
	}
	for _, ranges := range located.Locations {
		err = withSource(err, b.file, ranges)
	}
	return err
}
