// Package gateway serves the LLBBridge protocol on top of a frontend.Bridge:
// to clients that drive a build themselves over the control socket, and to
// frontends that run as containers.
package gateway

import (
	"context"
	"crypto/rand"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/platforms"
	"github.com/kilnbuild/kiln/frontend"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/ops"
	apitypes "github.com/moby/buildkit/api/types"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	capspb "github.com/moby/buildkit/util/apicaps/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Config is what a Server answers with.
type Config struct {
	Bridge  frontend.Bridge
	Inputs  map[string]*pb.Definition // answered by Inputs
	Workers []*apitypes.WorkerRecord  // answered by Ping
	LLBCaps []*capspb.APICap          // answered by Ping
}

// Server serves LLBBridge for one build. Refs it hands out are named by random
// ids that stay valid until the build ends (GW-029). Its methods are safe for
// concurrent use.
type Server struct {
	gwpb.UnimplementedLLBBridgeServer
	cfg Config

	mu         sync.Mutex // guards the fields below; never held across a call of the bridge
	refs       map[string]frontend.Ref
	containers map[string]frontend.Container // nil while one is being made
	returned   bool
	done       chan outcome // takes the one outcome of Return
}

type outcome struct {
	result *frontend.Result
	err    error
}

// NewServer returns a server without refs.
func NewServer(cfg Config) *Server {
	return &Server{cfg: cfg, refs: map[string]frontend.Ref{}, containers: map[string]frontend.Container{}, done: make(chan outcome, 1)}
}

// Wait returns what the other side passed to Return, or the cause of ctx's end.
func (s *Server) Wait(ctx context.Context) (*frontend.Result, error) {
	select {
	case o := <-s.done:
		return o.result, o.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Close forgets the refs when the build has ended: with their definitions and
// graphs they are most of what a large one takes.
func (s *Server) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refs = map[string]frontend.Ref{}
}

// Ping tells what the daemon can do.
func (s *Server) Ping(context.Context, *gwpb.PingRequest) (*gwpb.PongResponse, error) {
	return &gwpb.PongResponse{
		FrontendAPICaps: frontendCaps(),
		LLBCaps:         s.cfg.LLBCaps,
		Workers:         s.cfg.Workers,
	}, nil
}

// Inputs returns the definitions that the request carried.
func (s *Server) Inputs(context.Context, *gwpb.InputsRequest) (*gwpb.InputsResponse, error) {
	return &gwpb.InputsResponse{Definitions: s.cfg.Inputs}, nil
}

// Solve turns a definition, or another frontend's request, into lazy refs.
func (s *Server) Solve(ctx context.Context, req *gwpb.SolveRequest) (*gwpb.SolveResponse, error) {
	if err := checkDefinition("Definition", req.Definition); err != nil {
		return nil, err
	}
	ops.ShareMetadata(req.Definition)
	res, err := s.cfg.Bridge.Solve(ctx, frontend.SolveRequest{
		Definition:   req.Definition,
		Frontend:     req.Frontend,
		Opts:         req.FrontendOpt,
		Inputs:       req.FrontendInputs,
		CacheImports: req.CacheImports,
		Policies:     req.SourcePolicies,
		Evaluate:     req.Evaluate,
	})
	if err != nil {
		return nil, err
	}
	out := s.resultToProto(res, req.AllowResultArrayRef)
	if req.Final {
		s.finish(outcome{result: res})
	}
	if !req.AllowResultReturn {
		// Clients from before results were structured read the bare id.
		return &gwpb.SolveResponse{Ref: s.addRef(res.Ref)}, nil
	}
	return &gwpb.SolveResponse{Result: out}, nil
}

// ResolveImageConfig is the older, image-only form of ResolveSourceMeta.
func (s *Server) ResolveImageConfig(ctx context.Context, req *gwpb.ResolveImageConfigRequest) (*gwpb.ResolveImageConfigResponse, error) {
	if req.Ref == "" {
		return nil, missing("Ref")
	}
	op := &pb.SourceOp{Identifier: "docker-image://" + req.Ref}
	if req.ResolverType == 1 {
		op = &pb.SourceOp{Identifier: "oci-layout://" + req.Ref, Attrs: map[string]string{
			pb.AttrOCILayoutSessionID: req.SessionID,
			pb.AttrOCILayoutStoreID:   req.StoreID,
		}}
	}
	meta, err := s.cfg.Bridge.ResolveSourceMeta(ctx, op, frontend.MetaOptions{
		Platform:    platformOf(req.Platform),
		LogName:     req.LogName,
		ResolveMode: req.ResolveMode,
		Policies:    req.SourcePolicies,
	})
	if err != nil {
		return nil, err
	}
	_, ref, _ := strings.Cut(meta.Op.Identifier, "://")
	return &gwpb.ResolveImageConfigResponse{Digest: meta.Digest.String(), Config: meta.Config, Ref: ref}, nil
}

// ResolveSourceMeta asks a source what it stands for.
func (s *Server) ResolveSourceMeta(ctx context.Context, req *gwpb.ResolveSourceMetaRequest) (*gwpb.ResolveSourceMetaResponse, error) {
	if req.Source.GetIdentifier() == "" {
		return nil, missing("Source.Identifier")
	}
	return SourceMeta(req, func(opt frontend.MetaOptions) (*frontend.SourceMeta, error) {
		return s.cfg.Bridge.ResolveSourceMeta(ctx, req.Source, opt)
	})
}

// Evaluate forces a ref.
func (s *Server) Evaluate(ctx context.Context, req *gwpb.EvaluateRequest) (*gwpb.EvaluateResponse, error) {
	ref, err := s.ref(req.Ref)
	if err != nil {
		return nil, err
	}
	if ref != nil {
		if err := ref.Evaluate(ctx); err != nil {
			return nil, err
		}
	}
	return &gwpb.EvaluateResponse{}, nil
}

// Warn shows a warning at a vertex.
func (s *Server) Warn(ctx context.Context, req *gwpb.WarnRequest) (*gwpb.WarnResponse, error) {
	dgst, err := digest.Parse(req.Digest)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "Warn: digest %q: %v", req.Digest, err)
	}
	for i, r := range req.Ranges {
		if r.GetStart() == nil || r.GetEnd() == nil { // clients that print it rely on both
			return nil, status.Errorf(codes.InvalidArgument, "Warn: ranges[%d] has no start or no end", i)
		}
	}
	s.cfg.Bridge.Warn(ctx, progress.Warning{
		Vertex: dgst, Level: int(req.Level), Short: req.Short, Detail: req.Detail, URL: req.Url,
		SourceInfo: req.Info, Ranges: req.Ranges,
	})
	return &gwpb.WarnResponse{}, nil
}

// Return ends the build with a result or an error; it is accepted once.
func (s *Server) Return(ctx context.Context, req *gwpb.ReturnRequest) (*gwpb.ReturnResponse, error) {
	var o outcome
	switch {
	case req.Error != nil && req.Result != nil:
		return nil, status.Error(codes.InvalidArgument, "Return: both Result and Error are set")
	case req.Error != nil:
		o.err = grpcerrors.FromGRPC(status.ErrorProto(req.Error))
		if o.err == nil {
			return nil, status.Error(codes.InvalidArgument, "Return: Error has code OK")
		}
	case req.Result != nil:
		res, err := s.resultFromProto(req.Result)
		if err != nil {
			return nil, err
		}
		o.result = res
	default:
		return nil, status.Error(codes.InvalidArgument, "Return: neither Result nor Error is set")
	}
	if len(req.Result.GetAttestations()) > 0 && !s.ended() { // before the build goes on, and ends
		s.cfg.Bridge.Warn(ctx, progress.Warning{Level: 1, Short: []byte("attestations of the frontend's result are left out: this daemon does not export attestations")})
	}
	if !s.finish(o) {
		return nil, status.Error(codes.FailedPrecondition, "Return: the build has its result already")
	}
	return &gwpb.ReturnResponse{}, nil
}

func (s *Server) ended() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.returned
}

func (s *Server) finish(o outcome) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.returned {
		return false
	}
	s.returned = true
	s.done <- o
	return true
}

// addRef gives ref an id; a nil ref (scratch) has the empty id.
func (s *Server) addRef(ref frontend.Ref) string {
	if ref == nil {
		return ""
	}
	id := rand.Text()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refs[id] = ref
	return id
}

// ref returns the ref named id; the empty id is scratch, a nil ref.
func (s *Server) ref(id string) (frontend.Ref, error) {
	if id == "" {
		return nil, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if ref, ok := s.refs[id]; ok {
		return ref, nil
	}
	known := make([]string, 0, len(s.refs))
	for id := range s.refs {
		known = append(known, id)
	}
	slices.Sort(known)
	return nil, status.Errorf(codes.NotFound, "no such ref: %s, all %v", id, known)
}

func missing(field string) error {
	return status.Errorf(codes.InvalidArgument, "%s is missing", field)
}

// checkDefinition refuses what no op could come from; the loader checks the rest.
func checkDefinition(field string, def *pb.Definition) error {
	if def == nil {
		return nil
	}
	for i, op := range def.Def {
		if len(op) == 0 {
			return status.Errorf(codes.InvalidArgument, "%s.def[%d] is empty", field, i)
		}
	}
	return nil
}

func platformOf(p *pb.Platform) *ocispec.Platform {
	if p == nil {
		return nil
	}
	spec := platforms.Normalize(p.Spec())
	return &spec
}
