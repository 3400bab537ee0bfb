package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	control "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/filesync"
	"github.com/moby/buildkit/session/grpchijack"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// fakeDaemon answers as a test says.
type fakeDaemon struct {
	control.UnimplementedControlServer
	sessions *session.Manager
	solve    func(ctx context.Context, d *fakeDaemon, req *control.SolveRequest) (*control.SolveResponse, error)
	status   func(ctx context.Context, send func(*control.StatusResponse) error) error
	solved   chan struct{} // closed when solve returned
}

func (d *fakeDaemon) Session(stream control.Control_SessionServer) error {
	conn, closed, opts := grpchijack.Hijack(stream)
	defer conn.Close()
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	go func() { <-closed; cancel() }()
	return d.sessions.HandleConn(ctx, conn, opts)
}

func (d *fakeDaemon) Solve(ctx context.Context, req *control.SolveRequest) (*control.SolveResponse, error) {
	defer close(d.solved)
	return d.solve(ctx, d, req)
}

func (d *fakeDaemon) Status(_ *control.StatusRequest, stream control.Control_StatusServer) error {
	if d.status == nil {
		<-d.solved
		return nil
	}
	return d.status(stream.Context(), stream.Send)
}

func start(t *testing.T, d *fakeDaemon) *Client {
	t.Helper()
	d.solved = make(chan struct{})
	var err error
	if d.sessions, err = session.NewManager(); err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(grpc.UnaryInterceptor(grpcerrors.UnaryServerInterceptor), grpc.StreamInterceptor(grpcerrors.StreamServerInterceptor))
	control.RegisterControlServer(srv, d)
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	c, err := New("unix://"+path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); srv.Stop(); <-served })
	return c
}

func ok(context.Context, *fakeDaemon, *control.SolveRequest) (*control.SolveResponse, error) {
	return &control.SolveResponse{ExporterResponse: map[string]string{"k": "v"}}, nil
}

func TestSolve(t *testing.T) {
	var got *control.SolveRequest
	c := start(t, &fakeDaemon{
		solve: func(ctx context.Context, d *fakeDaemon, req *control.SolveRequest) (*control.SolveResponse, error) {
			got = req
			return ok(ctx, d, req)
		},
		status: func(_ context.Context, send func(*control.StatusResponse) error) error {
			for i := range 100 {
				if err := send(&control.StatusResponse{Vertexes: []*control.Vertex{{Name: fmt.Sprint(i)}}}); err != nil {
					return err
				}
			}
			return nil
		},
	})
	seen := 0
	resp, err := c.Solve(t.Context(), SolveOptions{Frontend: "f", Attrs: map[string]string{"a": "b"}, Exports: []Export{{Type: "image"}}, Entitlements: []string{"network.host"}},
		func(msg *control.StatusResponse) {
			if msg.Vertexes[0].Name != fmt.Sprint(seen) {
				t.Errorf("message %s, want %d", msg.Vertexes[0].Name, seen)
			}
			seen++
		})
	if err != nil {
		t.Fatal(err)
	}
	if resp["k"] != "v" || seen != 100 || got.Ref == "" || got.Session == "" || got.FrontendAttrs["a"] != "b" || got.Exporters[0].Type != "image" || got.Entitlements[0] != "network.host" {
		t.Errorf("response %v, %d messages, request %v", resp, seen, got)
	}
}

func TestErrorsKeepTheirSources(t *testing.T) {
	c := start(t, &fakeDaemon{solve: func(context.Context, *fakeDaemon, *control.SolveRequest) (*control.SolveResponse, error) {
		return nil, errdefs.WithSource(status.Error(codes.NotFound, "no such thing"), &errdefs.Source{Info: &pb.SourceInfo{Filename: "Dockerfile"}})
	}})
	_, err := c.Solve(t.Context(), SolveOptions{}, nil)
	if src := errdefs.Sources(err); len(src) != 1 || src[0].Info.Filename != "Dockerfile" || grpcerrors.Code(err) != codes.NotFound {
		t.Errorf("error %v, sources %v", err, src)
	}
}

// A status that doesn't end with its build is given up. compat: BCL-044
func TestStatusThatDoesNotEnd(t *testing.T) {
	c := start(t, &fakeDaemon{solve: ok, status: func(ctx context.Context, send func(*control.StatusResponse) error) error {
		<-ctx.Done()
		return ctx.Err()
	}})
	if resp, err := c.Solve(t.Context(), SolveOptions{}, func(*control.StatusResponse) {}); err != nil || resp["k"] != "v" {
		t.Errorf("%v, %v", resp, err)
	}
}

func TestCancelledSolve(t *testing.T) {
	arrived := make(chan struct{})
	ended := make(chan struct{})
	c := start(t, &fakeDaemon{
		solve: func(ctx context.Context, _ *fakeDaemon, _ *control.SolveRequest) (*control.SolveResponse, error) {
			close(arrived)
			<-ctx.Done()
			close(ended)
			return nil, ctx.Err()
		},
		status: func(ctx context.Context, _ func(*control.StatusResponse) error) error { <-ctx.Done(); return ctx.Err() },
	})
	cause := errors.New("the user has had enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	go func() { <-arrived; cancel(cause) }()
	_, err := c.Solve(ctx, SolveOptions{Ref: "r"}, func(*control.StatusResponse) {})
	if !errors.Is(err, cause) || !strings.Contains(err.Error(), "build r") {
		t.Errorf("error %v", err)
	}
	<-ended // the daemon was told
}

// Everything that a build started ends with it.
func TestNothingIsLeft(t *testing.T) {
	c := start(t, &fakeDaemon{solve: ok})
	if _, err := c.Solve(t.Context(), SolveOptions{}, func(*control.StatusResponse) {}); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<20)
	stacks := string(buf[:runtime.Stack(buf, true)])
	for _, mine := range []string{"client.(*Client).Solve", "client.(*Client).follow", "client.(*Client).Status"} {
		if strings.Contains(stacks, mine) {
			t.Errorf("%s still runs:\n%s", mine, stacks)
		}
	}
}

// An output that can't be made is the build's error.
func TestOutputThatCantBeCreated(t *testing.T) {
	send := func(ctx context.Context, d *fakeDaemon, req *control.SolveRequest) (*control.SolveResponse, error) {
		caller, err := d.sessions.Get(ctx, req.Session, false)
		if err != nil {
			return nil, err
		}
		w, err := filesync.CopyFileWriter(ctx, nil, 0, caller)
		if err != nil {
			return nil, err
		}
		if _, err := w.Write([]byte("archive")); err != nil {
			return nil, errors.Join(err, w.Close())
		}
		return &control.SolveResponse{}, w.Close()
	}
	dir := t.TempDir()
	export := func(dest string) Export {
		ex, err := ParseExport([]string{"type=tar", "dest=" + dest}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return ex
	}
	_, err := start(t, &fakeDaemon{solve: send}).Solve(t.Context(), SolveOptions{Exports: []Export{export(filepath.Join(dir, "no", "such", "dir"))}}, nil)
	if err == nil || !strings.Contains(err.Error(), "no such file or directory") {
		t.Errorf("error %v", err)
	}
	out := filepath.Join(dir, "out.tar")
	if _, err := start(t, &fakeDaemon{solve: send}).Solve(t.Context(), SolveOptions{Exports: []Export{export(out)}}, nil); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(out); err != nil || string(data) != "archive" {
		t.Errorf("output %q, %v", data, err)
	}
}

func TestBadOptions(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c := start(t, &fakeDaemon{solve: ok})
	for want, opts := range map[string]SolveOptions{
		"local ctx":       {Locals: map[string]string{"ctx": "/does/not/exist"}},
		"not a directory": {Locals: map[string]string{"ctx": file}},
		"OCI layout l":    {OCILayouts: map[string]string{"l": "/does/not/exist"}},
		"both a file":     {Exports: []Export{{Type: "tar", OutputDir: "d", Output: func(map[string]string) (io.WriteCloser, error) { return nil, nil }}}},
	} {
		if _, err := c.Solve(t.Context(), opts, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v", want, err)
		}
	}
}

func TestAddresses(t *testing.T) {
	for _, addr := range []string{"", "x", "npipe://x", "/run/s"} {
		if _, err := New(addr, Options{}); err == nil {
			t.Errorf("%q was accepted", addr)
		}
	}
	c, err := New("unix:///does/not/exist", Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Info(t.Context()); err == nil || !strings.Contains(err.Error(), "unix:///does/not/exist") {
		t.Errorf("error %v", err)
	}
	if _, err := c.Solve(t.Context(), SolveOptions{}, func(*control.StatusResponse) {}); err == nil {
		t.Error("a build without a daemon succeeded")
	}
}

// compat: BCL-020
func TestParseExport(t *testing.T) {
	for _, c := range []struct {
		fields string
		want   string // error
		typ    string
		dir    string
		attrs  int
	}{
		{"type=local,dest=d", "", "local", "d", 0}, {"type=image,name=n,push=true", "", "image", "", 2},
		{"TYPE=tar,Dest=x", "", "tar", "", 0}, {"type=oci", "", "oci", "", 0},
		{"dest=x", "needs type=", "", "", 0}, {"type=local", "needs dest=", "", "", 0}, {"type=image,dest=x", "takes no dest", "", "", 0},
		{"type=tar,output=x", "you meant dest=x", "", "", 0}, {"type", "key=value", "", "", 0},
	} {
		ex, err := ParseExport(strings.Split(c.fields, ","), nil)
		if c.want != "" {
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %v", c.fields, err)
			}
			continue
		}
		if err != nil || ex.Type != c.typ || ex.OutputDir != c.dir || len(ex.Attrs) != c.attrs || (ex.Output != nil) != (c.typ == "tar" || c.typ == "oci") {
			t.Errorf("%s: %+v, %v", c.fields, ex, err)
		}
	}
}

func TestArchiveToStdout(t *testing.T) {
	var out strings.Builder
	ex, err := ParseExport([]string{"type=tar", "dest=-"}, &out)
	if err != nil {
		t.Fatal(err)
	}
	w, err := ex.Output(nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("x")); err != nil || w.Close() != nil || out.String() != "x" {
		t.Errorf("wrote %q, %v", &out, err)
	}
	ex, err = ParseExport([]string{"type=tar"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ex.Output(nil); err == nil || !strings.Contains(err.Error(), "terminal") {
		t.Errorf("error %v", err)
	}
}
