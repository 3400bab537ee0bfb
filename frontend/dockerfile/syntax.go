package dockerfile

import (
	"context"
	"fmt"
	"maps"
	"strings"

	"github.com/kilnbuild/kiln/frontend"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/codes"
)

// capabilities of the frontend that a request may demand.
var capabilities = map[string]bool{
	"moby.buildkit.frontend.inputs":         true,
	"moby.buildkit.frontend.subrequests":    true,
	"moby.buildkit.frontend.contexts":       true,
	"moby.buildkit.frontend.gitquerystring": true,
	"moby.buildkit.frontend.contexts.zstd":  true,
}

// checkCaps checks a list of demanded capabilities. What is missing may be
// forwardable: then another frontend may have it.
func checkCaps(list string) (forwardable bool, err error) {
	if list == "" {
		return false, nil
	}
	for entry := range strings.SplitSeq(list, ",") {
		name, suffix, _ := strings.Cut(entry, "+")
		if capabilities[name] {
			continue
		}
		err = grpcerrors.WrapCode(errdefs.NewUnsupportedFrontendCapError(name), codes.Unimplemented)
		if !strings.Contains(suffix, "forward") {
			return false, err
		}
		forwardable = true
	}
	return forwardable, err
}

// forward hands the request to the frontend that the request or the first lines
// of the Dockerfile name. A request that was handed on before stays here.
func (b *build) forward(ctx context.Context) (_ *frontend.Result, ok bool, _ error) {
	if _, ok := b.cfg.opts["cmdline"]; ok {
		return nil, false, nil
	}
	if cmdline, ok := b.cfg.opts[argPrefix+"BUILDKIT_SYNTAX"]; ok {
		ref, _, _ := strings.Cut(strings.TrimSpace(cmdline), " ")
		res, err := b.forwardTo(ctx, ref, cmdline)
		if err != nil && len(errdefs.Sources(err)) == 0 {
			err = fmt.Errorf("failed with %sBUILDKIT_SYNTAX = %s: %w", argPrefix, cmdline, err)
		}
		return res, true, err
	}
	ref, cmdline, where, ok := parser.DetectSyntax(b.file.Data)
	if !ok {
		return nil, false, nil
	}
	res, err := b.forwardTo(ctx, ref, cmdline)
	if err != nil && len(errdefs.Sources(err)) == 0 {
		err = withSource(err, b.file, where)
	}
	return res, true, err
}

func (b *build) forwardTo(ctx context.Context, ref, cmdline string) (*frontend.Result, error) {
	opts := maps.Clone(b.cfg.opts)
	opts["cmdline"], opts["source"] = cmdline, ref
	return b.bridge.Solve(ctx, frontend.SolveRequest{
		Frontend: "gateway.v0",
		Opts:     opts,
		Inputs:   b.req.Inputs,
	})
}
