package explanation

import (
	"context"
	"errors"
	"flag"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func at(seconds int) time.Time { return time.Date(2026, 1, 2, 3, 4, seconds, 0, time.UTC) }

// sample has a step for every kind of cause.
func sample() *Build {
	parent := Cause{Kind: Parent, Subject: "[build 2/5] COPY src ./src", Certain: true, By: []Cause{{Kind: File, Subject: "src/main.go", To: "changed", Certain: true}}}
	ran := func(name string, causes ...Cause) Step {
		return Step{Name: name, Line: "Dockerfile:4", Ran: true, Duration: 1234 * time.Millisecond, Causes: causes, Compared: &Earlier{Ref: "before", Time: at(0)}}
	}
	digests := Cause{Kind: Image, Subject: "docker.io/library/alpine:3.20", From: "sha256:" + strings.Repeat("a", 64), To: "sha256:" + strings.Repeat("b", 64), Certain: true}
	return &Build{Ref: "ref", Started: at(10), Ended: at(20), Failed: true, Steps: []Step{
		ran("[internal] load build context", Cause{Kind: Always, Certain: true}),
		ran("no cache", Cause{Kind: NoCache, Subject: "--no-cache", Certain: true}),
		ran("new", Cause{Kind: New, Certain: true}),
		ran("evicted", Cause{Kind: Evicted, Subject: "gc rule#1", Time: at(1).Local(), Certain: true}),
		ran("gone", Cause{Kind: Gone, Certain: true}),
		ran("lost", Cause{Kind: Lost, From: "layer is missing", Certain: true}),
		ran("import", Cause{Kind: New, Certain: true}, Cause{Kind: Import, Subject: "registry r.example.com/cache", From: "connection refused"}),
		ran("failed", Cause{Kind: FailedBefore, Certain: true}),
		ran("parent", parent),
		ran("order", Cause{Kind: Order, Subject: "[2/3] RUN b", From: "[2] RUN a", Certain: true}),
		ran("files", Cause{Kind: File, Subject: "a", To: "added", Certain: true}, Cause{Kind: File, Subject: "b", To: "removed", Certain: true}, Cause{Kind: Files, Subject: "c", Certain: true}, Cause{Kind: Files, Certain: true}),
		ran("files of a stage", Cause{Kind: File, Subject: "out", To: "changed", Certain: true, By: []Cause{parent}}),
		ran("image", digests),
		ran("other image", Cause{Kind: Image, From: "alpine:3.19", To: "alpine:3.20", Certain: true}),
		ran("variables", Cause{Kind: Env, Subject: "A", From: Hidden, To: Hidden, Certain: true}, Cause{Kind: Env, Subject: "B", To: Hidden, Certain: true}, Cause{Kind: Argument, Subject: "C", From: Hidden, Certain: true}),
		ran("command", Cause{Kind: Command, From: "RUN make", Certain: true}),
		ran("user", Cause{Kind: Definition, Subject: "user", From: "root", To: "me", Certain: true}),
		ran("mode", Cause{Kind: Definition, Subject: "mode", To: "0600", Certain: true, By: []Cause{{Kind: Argument, Subject: "MODE"}}}),
		ran("definition", Cause{Kind: Definition, Certain: true}),
		ran("likely", Cause{Kind: Command}),
		ran("unknown"),
		{Name: "hostile \x1b[31m\nname\u202e", Ran: true, Failed: true, Causes: []Cause{{Kind: File, Subject: "\x1b[2J", To: "changed", Certain: true}}},
		{Name: "cached", Line: "Dockerfile:9"},
		{Name: "no such image", Failed: true},
	}}
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s:\n%s\nwant (rewrite with -update):\n%s", name, got, want)
	}
}

// TestMain has times printed in one zone, before anybody else asks for the time.
func TestMain(m *testing.M) {
	time.Local = time.UTC
	os.Exit(m.Run())
}

func TestText(t *testing.T) {
	for name, all := range map[string]bool{"ran.txt": false, "all.txt": true} {
		var s strings.Builder
		if err := sample().Write(&s, all, at(30)); err != nil {
			t.Fatal(err)
		}
		golden(t, name, s.String())
	}
}

func TestNothingRan(t *testing.T) {
	b := &Build{Ref: "ref", Steps: []Step{{Name: "a"}, {Name: "b"}}}
	var s strings.Builder
	if err := b.Write(&s, false, at(0)); err != nil {
		t.Fatal(err)
	}
	if want := "Build ref ran 0 of 2 steps in 0s; 2 came from the cache.\n"; s.String() != want {
		t.Errorf("%q, want %q", s.String(), want)
	}
}

// server has one build.
type server struct{ b *Build }

func (s server) Explain(_ context.Context, ref string) (*Build, error) {
	if ref != s.b.Ref {
		return nil, status.Errorf(codes.NotFound, "build %q", ref)
	}
	return s.b, nil
}

// What a client is told is what the server said.
func TestService(t *testing.T) {
	g := grpc.NewServer(grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
		if info.FullMethod != method {
			return nil, errors.New(info.FullMethod)
		}
		return next(ctx, req)
	}))
	Register(g, server{sample()})
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	defer func() {
		g.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	conn, err := grpc.NewClient("unix:"+l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	got, err := Ask(t.Context(), conn, "ref")
	if err != nil {
		t.Fatal(err)
	}
	want := sample()
	for i := range want.Steps { // a time is the same in every zone
		for j := range want.Steps[i].Causes {
			want.Steps[i].Causes[j].Time, got.Steps[i].Causes[j].Time = time.Time{}, time.Time{}
		}
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v\nwant %+v", got, want)
	}
	if _, err := Ask(t.Context(), conn, "other"); status.Code(err) != codes.NotFound {
		t.Error(err)
	}
}
