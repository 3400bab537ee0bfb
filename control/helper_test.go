package control

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/client"
	"github.com/kilnbuild/kiln/control/build"
	"github.com/kilnbuild/kiln/control/explain"
	"github.com/kilnbuild/kiln/control/history"
	"github.com/kilnbuild/kiln/frontend"
	"github.com/kilnbuild/kiln/frontend/dockerfile"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/worker"
	"github.com/kilnbuild/kiln/worker/export"
	control "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
)

// daemon is the services on a socket, with a real worker behind them.
type daemon struct {
	*Server
	t        testing.TB
	addr     string
	worker   *worker.Worker
	builds   *build.Engine
	history  *history.Log
	explain  *explain.Journal
	conn     *grpc.ClientConn
	frontend *fakeFrontend
}

// fakeFrontend does what a test says.
type fakeFrontend struct {
	mu    sync.Mutex
	solve func(ctx context.Context, b frontend.Bridge, req frontend.Request) (*frontend.Result, error)
}

func (f *fakeFrontend) Solve(ctx context.Context, b frontend.Bridge, req frontend.Request) (*frontend.Result, error) {
	f.mu.Lock()
	solve := f.solve
	f.mu.Unlock()
	if solve == nil {
		return &frontend.Result{}, nil
	}
	return solve(ctx, b, req)
}

// blocks makes the frontend wait for its build's end; started gets a word from
// each call.
func (f *fakeFrontend) blocks() (started chan struct{}) {
	started = make(chan struct{}, 10)
	f.solve = func(ctx context.Context, _ frontend.Bridge, _ frontend.Request) (*frontend.Result, error) {
		started <- struct{}{}
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}
	return started
}

func newDaemon(t testing.TB, linger time.Duration) *daemon { return newDaemonWith(t, linger, true) }

// newDaemonWith returns one that explains its builds or doesn't.
func newDaemonWith(t testing.TB, linger time.Duration, explained bool) *daemon {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts file systems: it needs root")
	}
	dir := t.TempDir()
	w, err := worker.New(context.Background(), worker.Config{Root: filepath.Join(dir, "state")})
	must(t, err)
	log := slog.New(slog.DiscardHandler)
	d := &daemon{t: t, worker: w, frontend: &fakeFrontend{}, explain: explain.Open(explain.Config{Store: w.Store(), Evictions: w.Cache()})}
	d.history = history.Open(history.Config{Store: w.Store(), MaxAge: time.Hour, MaxEntries: 10, Forgotten: d.explain.Forget})
	why := d.explain
	if !explained {
		why = nil
	}
	started, ended := Record(d.history, log)
	workers := func() []*apitypes.WorkerRecord { return []*apitypes.WorkerRecord{WorkerRecord(w)} }
	d.builds = build.NewEngine(build.Config{
		Worker:    w,
		Export:    export.Config{Cache: w.Cache(), Sessions: w.Sessions(), Registry: w.Registry(), Platform: w.Platforms()[0]},
		Frontends: map[string]frontend.Frontend{"fake": d.frontend, "dockerfile.v0": dockerfile.Frontend{}}, Explain: why, Workers: workers, LLBCaps: ops.Caps(),
		Entitlements: []string{"network.host", "device"}, Linger: linger, Log: log, Started: started, Ended: ended,
	})
	d.Server = New(Front{Workers: workers, Log: log})
	d.Open(Config{Builds: d.builds, History: d.history, Explain: d.explain, Cache: w.Cache(), Sessions: w.Sessions(), GCRules: w.GCRules()})
	g := grpc.NewServer(d.Options()...)
	d.Register(g)
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	must(t, err)
	d.addr = "unix://" + filepath.Join(dir, "s")
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	d.conn, err = grpc.NewClient(d.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	t.Cleanup(func() {
		d.conn.Close()
		ctx, cancel := context.WithCancelCause(context.Background())
		cancel(errors.New("the test is over"))
		d.builds.Drain(ctx)
		d.history.Close()
		d.explain.Close()
		g.Stop()
		<-served
		must(t, w.Close())
	})
	return d
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// control and bridge are the services as a client sees them; bridge for the
// build named ref.
func (d *daemon) control() control.ControlClient { return control.NewControlClient(d.conn) }
func (d *daemon) bridge() gwpb.LLBBridgeClient   { return gwpb.NewLLBBridgeClient(d.conn) }

func inBuild(ctx context.Context, ref string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, buildIDKey, ref)
}

func (d *daemon) client() *client.Client {
	d.t.Helper()
	c, err := client.New(d.addr, client.Options{})
	must(d.t, err)
	d.t.Cleanup(func() { c.Close() })
	return c
}

// clientDriven starts a build that waits for its client, and returns a
// function that waits for its end.
func (d *daemon) clientDriven(ctx context.Context, ref string) (wait func() error) {
	done := make(chan error, 1)
	go func() {
		_, err := d.control().Solve(ctx, &control.SolveRequest{Ref: ref})
		done <- err
	}()
	return func() error { return <-done }
}

// definition of a file op with the given actions, on scratch.
func definition(t testing.TB, actions ...*pb.FileAction) *pb.Definition {
	t.Helper()
	for i, a := range actions {
		a.Input, a.SecondaryInput, a.Output = int64(i-1), -1, -1
		if i == len(actions)-1 {
			a.Output = 0
		}
	}
	op, err := proto.Marshal(&pb.Op{
		Op:       &pb.Op_File{File: &pb.FileOp{Actions: actions}},
		Platform: &pb.Platform{OS: "linux", Architecture: "amd64"}, Constraints: &pb.WorkerConstraints{},
	})
	must(t, err)
	last, err := proto.Marshal(&pb.Op{Inputs: []*pb.Input{{Digest: digest.FromBytes(op).String()}}})
	must(t, err)
	return &pb.Definition{Def: [][]byte{op, last}, Metadata: map[string]*pb.OpMetadata{
		digest.FromBytes(op).String(): {Description: map[string]string{"llb.customname": "make files"}},
	}}
}

func mkfile(path, content string) *pb.FileAction {
	return &pb.FileAction{Action: &pb.FileAction_Mkfile{Mkfile: &pb.FileActionMkFile{Path: path, Mode: 0o644, Data: []byte(content)}}}
}

func mkdir(path string) *pb.FileAction {
	return &pb.FileAction{Action: &pb.FileAction_Mkdir{Mkdir: &pb.FileActionMkDir{Path: path, Mode: 0o755}}}
}

func symlink(old, new string) *pb.FileAction {
	return &pb.FileAction{Action: &pb.FileAction_Symlink{Symlink: &pb.FileActionSymlink{Oldpath: old, Newpath: new}}}
}
