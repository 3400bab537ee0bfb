package monitor

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/control/build"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/solver"
	"github.com/kilnbuild/kiln/worker"
	"github.com/kilnbuild/kiln/worker/export"
	"github.com/kilnbuild/kiln/worker/verify"
	apitypes "github.com/moby/buildkit/api/types"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newEngine returns an engine that a monitor watches.
func newEngine(t *testing.T, share float64) (*build.Engine, *Monitor) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts file systems: it needs root")
	}
	log := slog.New(slog.DiscardHandler)
	w, err := worker.New(context.Background(), worker.Config{Root: t.TempDir()})
	must(t, err)
	t.Cleanup(func() { must(t, w.Close()) })
	cfg := Config{Cache: w.Cache()}
	if share > 0 {
		cfg.Verify = verify.New(verify.Config{Share: share, Cache: w.Cache(), Keys: w.Keys(), Repeat: ops.Repeat, Log: log})
		t.Cleanup(cfg.Verify.Close)
	}
	m := New()
	m.Attach(cfg)
	e := build.NewEngine(build.Config{
		Worker: w, Workers: func() []*apitypes.WorkerRecord { return nil }, Log: log, LLBCaps: ops.Caps(), Ended: m.Ended,
		Watch:  []func() (solver.Observer, func()){m.Watch},
		Export: export.Config{Cache: w.Cache(), Sessions: w.Sessions(), Registry: w.Registry(), Platform: w.Platforms()[0]},
	})
	return e, m
}

// definition of a step that writes a file, or fails for want of its directory.
func definition(t *testing.T, path string) *pb.Definition {
	t.Helper()
	op, err := proto.Marshal(&pb.Op{
		Op: &pb.Op_File{File: &pb.FileOp{Actions: []*pb.FileAction{{Input: -1, SecondaryInput: -1, Output: 0,
			Action: &pb.FileAction_Mkfile{Mkfile: &pb.FileActionMkFile{Path: path, Mode: 0o644, Data: []byte("x")}}}}}},
		Platform: &pb.Platform{OS: "linux", Architecture: "amd64"}, Constraints: &pb.WorkerConstraints{},
	})
	must(t, err)
	last, err := proto.Marshal(&pb.Op{Inputs: []*pb.Input{{Digest: digest.FromBytes(op).String()}}})
	must(t, err)
	return &pb.Definition{Def: [][]byte{op, last}}
}

// page is what a GET of path gives.
func page(t *testing.T, h http.Handler, method, path string) (status int, body string, header http.Header) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), method, path, nil))
	return w.Code, w.Body.String(), w.Header()
}

func wantLines(t *testing.T, text string, want ...string) {
	t.Helper()
	for _, line := range want {
		if !strings.Contains(text, "\n"+line+"\n") {
			t.Errorf("no line %q in\n%s", line, text)
		}
	}
}

// compat: DMN-115
func TestBuildsAreCounted(t *testing.T) {
	e, m := newEngine(t, 0)
	status, before, header := page(t, m.Handler(), "GET", "/metrics")
	if status != 200 || !strings.HasPrefix(header.Get("Content-Type"), "text/plain; version=0.0.4") {
		t.Errorf("status %d, header %v", status, header)
	}
	wantLines(t, before, "kiln_builds_started_total 0", "kiln_builds_running 0", `kiln_vertices_total{result="hit"} 0`,
		`buildkit_builds_total{status="success",error_code=""} 0`, "# TYPE buildkit_build_duration_seconds histogram")
	for i, c := range []struct {
		path string
		ok   bool
	}{{"/a", true}, {"/a", true}, {"/missing/a", false}} {
		_, err := e.Run(t.Context(), build.Request{Ref: string(rune('a' + i)), Definition: definition(t, c.path)})
		if (err == nil) != c.ok {
			t.Fatalf("build of %s: %v", c.path, err)
		}
	}
	_, after, _ := page(t, m.Handler(), "GET", "/metrics")
	wantLines(t, after, "kiln_builds_started_total 3", "kiln_builds_running 0",
		`buildkit_builds_total{status="success",error_code=""} 2`, `buildkit_builds_total{status="failure",error_code="Unknown"} 1`,
		`buildkit_builds_steps_total{kind="cached"} 1`, `buildkit_builds_steps_total{kind="total"} 3`,
		`buildkit_build_duration_seconds_count{status="success"} 2`,
		`kiln_vertices_total{result="hit"} 1`, `kiln_vertices_total{result="executed"} 1`, `kiln_vertices_total{result="failed"} 1`,
		"kiln_step_duration_seconds_count 1", `kiln_cache_records{type="regular"} 1`, "kiln_cache_evicted_records_total 0")
	if strings.Contains(after, "kiln_verify") {
		t.Error("there are counts of a verifier that isn't there")
	}
}

func TestCallsAreCounted(t *testing.T) {
	_, m := newEngine(t, 0)
	srv := grpc.NewServer(m.Options()...)
	healthpb.RegisterHealthServer(srv, health.NewServer())
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	defer func() { srv.Stop(); <-served }()
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	must(t, err)
	defer conn.Close()
	c := healthpb.NewHealthClient(conn)
	_, err = c.Check(t.Context(), &healthpb.HealthCheckRequest{})
	must(t, err)
	if _, err := c.Check(t.Context(), &healthpb.HealthCheckRequest{Service: "unknown"}); err == nil {
		t.Error("the health of an unknown service is known")
	}
	ctx, cancel := context.WithCancel(t.Context())
	watch, err := c.Watch(ctx, &healthpb.HealthCheckRequest{})
	must(t, err)
	_, err = watch.Recv()
	must(t, err)
	if n := m.inCall("/grpc.health.v1.Health/Watch"); n != 1 {
		t.Errorf("%d calls of Watch are going on", n)
	}
	cancel()
	for err == nil {
		_, err = watch.Recv()
	}
	srv.GracefulStop() // waits for the calls
	ended := m.call(sessionMethod)
	_, text, _ := page(t, m.Handler(), "GET", "/metrics")
	wantLines(t, text, "kiln_sessions 1", `kiln_rpcs_total{method="/grpc.health.v1.Health/Check",code="OK"} 1`,
		`kiln_rpcs_total{method="/grpc.health.v1.Health/Check",code="NotFound"} 1`, `kiln_rpcs_total{method="/grpc.health.v1.Health/Watch",code="Canceled"} 1`)
	failed := errors.New("hung up")
	ended(&failed)
	_, text, _ = page(t, m.Handler(), "GET", "/metrics")
	wantLines(t, text, "kiln_sessions 0")
}

func TestPages(t *testing.T) {
	_, m := newEngine(t, 0)
	h := m.Handler()
	for _, c := range []struct {
		method, path string
		status       int
		want         string
	}{
		{"GET", "/debug/vars", 200, `"memstats"`},
		{"GET", "/debug/pprof/", 200, "goroutine"},
		{"GET", "/debug/pprof/goroutine?debug=1", 200, "goroutine profile"},
		{"GET", "/debug/pprof/cmdline", 200, ""},
		{"GET", "/debug/gc", 200, ""},
		{"GET", "/debug/cache/verify", 404, "--cache-verify"},
		{"GET", "/debug/unknown", 404, ""},
		{"POST", "/metrics", 405, ""},
		{"GET", "/debug/flight/trace", 409, "not running"},
		{"POST", "/debug/flight/trace/stop", 409, "not running"},
		{"POST", "/debug/flight/trace/set_period?period=soon", 400, "soon"},
		{"POST", "/debug/flight/trace/set_period?period=5s", 200, ""},
		{"POST", "/debug/flight/trace/start", 200, ""},
		{"POST", "/debug/flight/trace/start", 409, "already running"},
		{"POST", "/debug/flight/trace/set_period?period=1s", 412, "stop it"},
		{"GET", "/debug/flight/trace", 200, "go 1."},
		{"POST", "/debug/flight/trace/stop", 200, ""},
	} {
		status, body, _ := page(t, h, c.method, c.path)
		if status != c.status || !strings.Contains(body, c.want) {
			t.Errorf("%s %s: %d %.200q, want %d %q", c.method, c.path, status, body, c.status, c.want)
		}
	}
	_, m = newEngine(t, 1)
	if status, body, _ := page(t, m.Handler(), "GET", "/debug/cache/verify"); status != 200 || !strings.Contains(body, `"queued": 0`) {
		t.Errorf("verify: %d %s", status, body)
	}
	_, text, _ := page(t, m.Handler(), "GET", "/metrics")
	wantLines(t, text, `kiln_verify_total{outcome="wrong"} 0`, `kiln_verify_total{outcome="nondeterministic"} 0`, `kiln_verify_total{outcome="equal"} 0`, "kiln_verify_queued 0")
}
