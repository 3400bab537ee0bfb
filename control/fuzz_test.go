package control

import (
	"context"
	"testing"
	"time"

	control "github.com/moby/buildkit/api/services/control"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
)

// sink is a server stream whose messages go nowhere.
type sink[T any] struct {
	grpc.ServerStream
	ctx context.Context
}

func (s sink[T]) Context() context.Context     { return s.ctx }
func (s sink[T]) Send(*T) error                { return nil }
func (s sink[T]) SendHeader(metadata.MD) error { return nil }

// FuzzRequests sends arbitrary messages to every handler: an answer or an
// error, never a panic.
func FuzzRequests(f *testing.F) {
	d := newDaemon(f, 0)
	gw := d.fuzzBuild(f)
	handlers := d.handlers(gw)
	for i, seed := range []proto.Message{
		&control.SolveRequest{Ref: "r", Frontend: "fake", Exporters: []*control.Exporter{{Type: "image", Attrs: map[string]string{"name": "x"}}}},
		&gwpb.SolveRequest{Definition: definition(f, mkfile("/f", "x")), AllowResultReturn: true},
		&gwpb.ResolveSourceMetaRequest{LogName: "x"},
		&gwpb.ReadFileRequest{FilePath: "/x", Range: &gwpb.FileRange{Offset: 1, Length: 2}},
		&gwpb.ReadDirRequest{DirPath: "/", IncludePattern: "*"},
		&gwpb.StatFileRequest{Path: "/"},
		&gwpb.ReturnRequest{Result: &gwpb.Result{Result: &gwpb.Result_RefDeprecated{RefDeprecated: "x"}}},
		&gwpb.WarnRequest{Digest: "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
		&control.PruneRequest{Filter: []string{"type==regular"}},
		&control.DiskUsageRequest{Filter: []string{"id~=.*"}},
		&control.ListWorkersRequest{Filter: []string{"labels.a==b"}},
		&control.BuildHistoryRequest{EarlyExit: true, Limit: 2},
		&control.UpdateBuildHistoryRequest{Ref: "r", Pinned: true},
	} {
		raw, err := proto.Marshal(seed)
		must(f, err)
		f.Add(byte(i), raw)
	}
	f.Fuzz(func(t *testing.T, which byte, raw []byte) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := handlers[int(which)%len(handlers)](ctx, raw); err != nil {
			_ = toGRPC(ctx, err)
		}
	})
}

// fuzzBuild returns a context that names a build that its client drives.
func (d *daemon) fuzzBuild(t testing.TB) func(context.Context) context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = d.Solve(ctx, &control.SolveRequest{Ref: "fuzzed"}) // ends with the test
	}()
	t.Cleanup(func() { cancel(); <-done })
	_, err := d.builds.Get(ctx, "fuzzed", time.Minute)
	must(t, err)
	return func(ctx context.Context) context.Context {
		return metadata.NewIncomingContext(ctx, metadata.Pairs(buildIDKey, "fuzzed"))
	}
}

type handler func(ctx context.Context, raw []byte) error

// unary is a handler of requests of one type.
func unary[Req, Resp any, P interface {
	*Req
	proto.Message
}](fn func(context.Context, P) (Resp, error)) handler {
	return func(ctx context.Context, raw []byte) error {
		req := P(new(Req))
		if proto.Unmarshal(raw, req) != nil {
			return nil
		}
		_, err := fn(ctx, req)
		return err
	}
}

func (d *daemon) handlers(gw func(context.Context) context.Context) []handler {
	r := &bridgeRouter{server: d.Server}
	inside := func(h handler) handler {
		return func(ctx context.Context, raw []byte) error { return h(gw(ctx), raw) }
	}
	return []handler{
		unary(func(ctx context.Context, req *control.SolveRequest) (*control.SolveResponse, error) {
			if req.Frontend == "" && len(req.Definition.GetDef()) == 0 {
				req.Frontend = "fake" // else it waits for its client
			}
			req.Ref += "-fuzz"
			return d.Solve(ctx, req)
		}),
		inside(unary(r.Solve)), inside(unary(r.ResolveSourceMeta)), inside(unary(r.ReadFile)), inside(unary(r.ReadDir)),
		inside(unary(r.StatFile)), inside(unary(func(ctx context.Context, req *gwpb.ReturnRequest) (*gwpb.ReturnResponse, error) {
			if req.Error == nil && req.Result.GetRef().GetId() == "" && req.Result.GetRefDeprecated() == "" {
				return nil, nil // it would end the build that all others need
			}
			req.Error = nil
			return r.Return(ctx, req)
		})), inside(unary(r.Warn)),
		unary(func(ctx context.Context, req *control.PruneRequest) (any, error) {
			return nil, d.Prune(req, sink[control.UsageRecord]{ctx: ctx})
		}),
		unary(d.DiskUsage), unary(d.ListWorkers),
		unary(func(ctx context.Context, req *control.BuildHistoryRequest) (any, error) {
			req.EarlyExit = true
			return nil, d.ListenBuildHistory(req, sink[control.BuildHistoryEvent]{ctx: ctx})
		}),
		unary(d.UpdateBuildHistory), inside(unary(r.Evaluate)), inside(unary(r.ResolveImageConfig)),
	}
}
