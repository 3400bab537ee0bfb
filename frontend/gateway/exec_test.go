package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/frontend"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	fstypes "github.com/tonistiigi/fsutil/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

// fakeContainer runs Go functions where processes would run.
type fakeContainer struct {
	run      func(ctx context.Context, req frontend.ProcessRequest) error
	released int
}

func (c *fakeContainer) Run(ctx context.Context, req frontend.ProcessRequest) error {
	return c.run(ctx, req)
}
func (c *fakeContainer) ReadFile(_ context.Context, mount int, path string, _ *gwpb.FileRange) ([]byte, error) {
	return fmt.Appendf(nil, "%d:%s", mount, path), nil
}
func (c *fakeContainer) ReadDir(_ context.Context, mount int, path, include string) ([]*fstypes.Stat, error) {
	return []*fstypes.Stat{{Path: fmt.Sprint(mount, path, include)}}, nil
}
func (c *fakeContainer) StatFile(_ context.Context, mount int, path string) (*fstypes.Stat, error) {
	return &fstypes.Stat{Path: fmt.Sprint(mount, path)}, nil
}
func (c *fakeContainer) Release() error { c.released++; return nil }

// fakeProcess notes what happens to it.
type fakeProcess struct{ events chan string }

func (p fakeProcess) Signal(sig syscall.Signal) error {
	p.events <- fmt.Sprint("signal ", int(sig))
	return nil
}
func (p fakeProcess) Resize(rows, cols uint16) error {
	p.events <- fmt.Sprint("resize ", rows, " ", cols)
	return nil
}

// fakeStream is a client's end of ExecProcess in the same process.
type fakeStream struct {
	grpc.ServerStream
	ctx    context.Context
	cancel context.CancelFunc
	in     chan *gwpb.ExecMessage
	out    chan *gwpb.ExecMessage
	result chan error
}

// open begins an ExecProcess.
func open(t *testing.T, s *Server) *fakeStream {
	f := &fakeStream{in: make(chan *gwpb.ExecMessage), out: make(chan *gwpb.ExecMessage), result: make(chan error, 1)}
	f.ctx, f.cancel = context.WithCancel(t.Context())
	handler, ended := context.WithCancel(f.ctx) // gRPC lets go of Recv and Send when the handler returns
	go func() {
		err := s.ExecProcess(boundTo{f, handler})
		ended()
		f.result <- err
	}()
	t.Cleanup(f.cancel)
	return f
}

type boundTo struct {
	*fakeStream
	handler context.Context
}

func (f boundTo) Context() context.Context { return f.ctx }

func (f boundTo) Recv() (*gwpb.ExecMessage, error) {
	select {
	case m, ok := <-f.in:
		if !ok {
			return nil, io.EOF
		}
		return m, nil
	case <-f.handler.Done():
		return nil, f.handler.Err()
	}
}

func (f boundTo) Send(m *gwpb.ExecMessage) error {
	select {
	case f.out <- m:
		return nil
	case <-f.handler.Done():
		return f.handler.Err()
	}
}

const patience = 30 * time.Second

func (f *fakeStream) say(t *testing.T, m *gwpb.ExecMessage) {
	t.Helper()
	select {
	case f.in <- m:
	case err := <-f.result:
		f.result <- err
	case <-time.After(patience):
		t.Fatal("nobody listens")
	}
}

// hear returns what the server says of a process until it is done, as text.
func (f *fakeStream) hear(t *testing.T) string {
	t.Helper()
	var out []string
	for {
		select {
		case m := <-f.out:
			text := fmt.Sprintf("%T", m.Input)[len("*moby_buildkit_v1_frontend.ExecMessage_"):]
			switch {
			case m.GetFile() != nil:
				text = fmt.Sprintf("%d:%s", m.GetFile().Fd, m.GetFile().Data)
				if m.GetFile().EOF {
					text += "EOF"
				}
			case m.GetExit() != nil:
				text = fmt.Sprintf("exit %d %s", m.GetExit().Code, m.GetExit().GetError().GetMessage())
			}
			out = append(out, m.ProcessID+" "+text)
			if m.GetDone() != nil {
				return strings.Join(out, "; ")
			}
		case <-time.After(patience):
			t.Fatalf("heard only %q", out)
		}
	}
}

// end waits for the call's end.
func (f *fakeStream) end(t *testing.T) error {
	t.Helper()
	select {
	case err := <-f.result:
		return err
	case <-time.After(patience):
		t.Fatal("the stream does not end")
		return nil
	}
}

func initMsg(id string, init *gwpb.InitMessage) *gwpb.ExecMessage {
	if init.ContainerID == "" {
		init.ContainerID = "c"
	}
	if init.Meta == nil {
		init.Meta = &pb.Meta{Args: []string{"x"}}
	}
	return &gwpb.ExecMessage{ProcessID: id, Input: &gwpb.ExecMessage_Init{Init: init}}
}

func fileMsg(id string, m *gwpb.FdMessage) *gwpb.ExecMessage {
	return &gwpb.ExecMessage{ProcessID: id, Input: &gwpb.ExecMessage_File{File: m}}
}

func signalMsg(id, name string) *gwpb.ExecMessage {
	return &gwpb.ExecMessage{ProcessID: id, Input: &gwpb.ExecMessage_Signal{Signal: &gwpb.SignalMessage{Name: name}}}
}

func resizeMsg(id string, rows, cols uint32) *gwpb.ExecMessage {
	return &gwpb.ExecMessage{ProcessID: id, Input: &gwpb.ExecMessage_Resize{Resize: &gwpb.ResizeMessage{Rows: rows, Cols: cols}}}
}

// serve returns a server with a container "c" whose processes are run.
func serve(t *testing.T, run func(ctx context.Context, req frontend.ProcessRequest) error) *Server {
	t.Helper()
	s := newServer(&fakeBridge{container: func(frontend.ContainerRequest) (frontend.Container, error) {
		return &fakeContainer{run: run}, nil
	}})
	_, err := s.NewContainer(t.Context(), &gwpb.NewContainerRequest{ContainerID: "c"})
	must(t, err)
	return s
}

// compat: GW-053, GW-054, GW-055, GW-056, GW-057, GW-058, GW-059
func TestExecProcess(t *testing.T) {
	s := serve(t, func(ctx context.Context, req frontend.ProcessRequest) error {
		events := make(chan string, 10)
		switch req.Meta.Args[0] {
		case "echo":
			req.Started(fakeProcess{events})
			_, err := io.Copy(req.Stdout, req.Stdin)
			fmt.Fprint(req.Stderr, "bye")
			return err
		case "missing":
			fmt.Fprint(req.Stderr, "no such program")
			return &gwpb.ExitError{ExitCode: 127, Err: errors.New("not found")}
		case "told":
			req.Started(fakeProcess{events})
			return &gwpb.ExitError{ExitCode: 3, Err: errors.New(<-events + ", " + <-events)}
		case "tty":
			if !req.Terminal || req.Security != pb.SecurityMode_INSECURE || req.SecretEnv[0].ID != "s" || req.Meta.User != "u" {
				return fmt.Errorf("asked for as %+v", req)
			}
			req.Started(fakeProcess{events})
			return nil
		}
		return errors.New("something else")
	})
	all := []uint32{2, 1, 0, 1}
	for _, c := range []struct {
		name string
		init *gwpb.InitMessage
		say  []*gwpb.ExecMessage
		want string
	}{
		{"Streams", &gwpb.InitMessage{Meta: &pb.Meta{Args: []string{"echo"}}, Fds: all}, []*gwpb.ExecMessage{
			fileMsg("", &gwpb.FdMessage{Data: []byte("one")}), fileMsg("", &gwpb.FdMessage{EOF: true}),
		}, "Started; 1:one; 2:bye; 1:EOF; 2:EOF; exit 0 ; Done"},
		{"NotStarted", &gwpb.InitMessage{Meta: &pb.Meta{Args: []string{"missing"}}, Fds: all}, nil,
			"Started; 2:no such program; 1:EOF; 2:EOF; exit 127 not found; Done"},
		{"Told", &gwpb.InitMessage{Meta: &pb.Meta{Args: []string{"told"}}}, []*gwpb.ExecMessage{resizeMsg("", 3, 4), signalMsg("", "INT")},
			"Started; exit 3 resize 3 4, signal 2; Done"},
		{"Terminal", &gwpb.InitMessage{
			Meta: &pb.Meta{Args: []string{"tty"}, User: "u"}, Tty: true, Security: pb.SecurityMode_INSECURE, Secretenv: []*pb.SecretEnv{{ID: "s"}},
		}, nil, "Started; exit 0 ; Done"},
		{"OtherErrors", &gwpb.InitMessage{}, nil, "Started; exit 255 something else; Done"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := open(t, s)
			f.say(t, initMsg("p", c.init))
			go func() {
				for _, m := range c.say {
					m.ProcessID = "p"
					f.say(t, m)
				}
			}()
			if got := strings.ReplaceAll(f.hear(t), "p ", ""); got != c.want {
				t.Errorf("heard %q, want %q", got, c.want)
			}
			// What comes too late is not an error.
			f.say(t, signalMsg("p", "KILL"))
			f.say(t, resizeMsg("p", 1, 1))
			if slices.Contains(c.init.Fds, 0) && c.name != "Streams" {
				f.say(t, fileMsg("p", &gwpb.FdMessage{Data: []byte("late")}))
			}
			close(f.in)
			if err := f.end(t); err != nil {
				t.Errorf("the stream ended with %v", err)
			}
		})
	}
}

// Bad messages end the stream with an error that says why, and its processes.
func TestBadExecMessages(t *testing.T) {
	for _, c := range []struct {
		name string
		msg  *gwpb.ExecMessage
		code codes.Code
		want string
	}{
		{"NoID", initMsg("", &gwpb.InitMessage{}), codes.InvalidArgument, "ProcessID"},
		{"Empty", &gwpb.ExecMessage{ProcessID: "p"}, codes.InvalidArgument, "not one that a client sends"},
		{"ServersMessage", &gwpb.ExecMessage{ProcessID: "p", Input: &gwpb.ExecMessage_Done{}}, codes.InvalidArgument, "not one that a client sends"},
		{"NilInit", &gwpb.ExecMessage{ProcessID: "q", Input: &gwpb.ExecMessage_Init{}}, codes.NotFound, "no process"},
		{"NoMeta", &gwpb.ExecMessage{ProcessID: "q", Input: &gwpb.ExecMessage_Init{Init: &gwpb.InitMessage{ContainerID: "c"}}}, codes.InvalidArgument, "Init.Meta"},
		{"NoContainer", initMsg("q", &gwpb.InitMessage{ContainerID: "other"}), codes.NotFound, `"other"`},
		{"Twice", initMsg("p", &gwpb.InitMessage{}), codes.AlreadyExists, "p"},
		{"BadFd", initMsg("q", &gwpb.InitMessage{Fds: []uint32{0, 7}}), codes.InvalidArgument, "7"},
		{"UnknownProcess", fileMsg("q", &gwpb.FdMessage{}), codes.NotFound, `"q"`},
		{"ResizeUnknown", resizeMsg("q", 1, 1), codes.NotFound, `"q"`},
		{"WriteToOutput", fileMsg("p", &gwpb.FdMessage{Fd: 1, Data: []byte("x")}), codes.OutOfRange, "fd 1"},
		{"WriteToNothing", fileMsg("p", &gwpb.FdMessage{Data: []byte("x")}), codes.OutOfRange, "fd 0"},
		{"NilFile", fileMsg("p", nil), codes.OutOfRange, "fd 0"},
		{"UnknownSignal", signalMsg("p", "NOPE"), codes.InvalidArgument, "NOPE"},
		{"NilSignal", &gwpb.ExecMessage{ProcessID: "p", Input: &gwpb.ExecMessage_Signal{}}, codes.InvalidArgument, "signal"},
		{"Huge", resizeMsg("p", 1<<16, 1), codes.InvalidArgument, "65536 rows"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ended := make(chan error, 1)
			s := serve(t, func(ctx context.Context, req frontend.ProcessRequest) error {
				req.Started(fakeProcess{})
				<-ctx.Done()
				ended <- context.Cause(ctx)
				return context.Cause(ctx)
			})
			f := open(t, s)
			f.say(t, initMsg("p", &gwpb.InitMessage{}))
			<-f.out // Started
			f.say(t, c.msg)
			wantCode(t, f.end(t), c.code, c.want)
			if err := <-ended; !errors.Is(err, errStreamEnded) {
				t.Errorf("the process was ended by %v", err)
			}
		})
	}
}

// A client that dies, doesn't read or says no more.
func TestExecClients(t *testing.T) {
	t.Run("Dies", func(t *testing.T) {
		ended := make(chan struct{})
		s := serve(t, func(ctx context.Context, req frontend.ProcessRequest) error {
			req.Started(fakeProcess{})
			<-ctx.Done()
			close(ended)
			return ctx.Err()
		})
		f := open(t, s)
		f.say(t, initMsg("p", &gwpb.InitMessage{}))
		<-f.out
		f.cancel()
		<-ended
		if err := f.end(t); !errors.Is(err, context.Canceled) {
			t.Errorf("the stream ended with %v", err)
		}
	})
	t.Run("DoesNotRead", func(t *testing.T) {
		var mu sync.Mutex
		written, blocked := 0, make(chan struct{})
		s := serve(t, func(ctx context.Context, req frontend.ProcessRequest) error {
			req.Started(fakeProcess{})
			for {
				n, err := req.Stdout.Write(bytes.Repeat([]byte("x"), 1<<10))
				if err != nil {
					return err
				}
				mu.Lock()
				if written += n; written == 2<<10 { // one is with the sender, one is offered
					close(blocked)
				}
				mu.Unlock()
			}
		})
		f := open(t, s)
		f.say(t, initMsg("p", &gwpb.InitMessage{Fds: []uint32{1}}))
		if m := <-f.out; m.GetStarted() == nil {
			t.Fatalf("heard %v", m)
		}
		<-f.out // a kilobyte, and no more
		<-blocked
		f.cancel()
		f.end(t)
		mu.Lock()
		defer mu.Unlock()
		if written > 4<<10 {
			t.Errorf("%d bytes were taken for a client that doesn't read", written)
		}
	})
	t.Run("SaysNoMore", func(t *testing.T) {
		s := serve(t, func(_ context.Context, req frontend.ProcessRequest) error {
			req.Started(fakeProcess{})
			_, err := io.Copy(req.Stdout, req.Stdin)
			return err
		})
		f := open(t, s)
		f.say(t, initMsg("p", &gwpb.InitMessage{Fds: []uint32{0, 1}}))
		f.say(t, fileMsg("p", &gwpb.FdMessage{Data: []byte("last")}))
		close(f.in)
		if got, want := f.hear(t), "p Started; p 1:last; p 1:EOF; p exit 0 ; p Done"; got != want {
			t.Errorf("heard %q, want %q", got, want)
		}
		if err := f.end(t); err != nil {
			t.Errorf("the stream ended with %v", err)
		}
	})
	t.Run("SendsWhatNobodyReads", func(t *testing.T) {
		s := serve(t, func(_ context.Context, req frontend.ProcessRequest) error {
			req.Started(fakeProcess{})
			return req.Stdin.(io.Closer).Close()
		})
		f := open(t, s)
		f.say(t, initMsg("p", &gwpb.InitMessage{Fds: []uint32{0}}))
		go func() {
			for range 3 {
				f.say(t, fileMsg("p", &gwpb.FdMessage{Data: bytes.Repeat([]byte("x"), 1<<20)}))
			}
			close(f.in)
		}()
		f.hear(t)
		if err := f.end(t); err != nil {
			t.Errorf("the stream ended with %v", err)
		}
	})
}

// compat: GW-050, GW-052, GW-062, GW-C19, GW-C20, GW-C21, GW-C22, GW-C23, LLB-050
func TestContainers(t *testing.T) {
	made := &fakeContainer{}
	ref := &fakeRef{name: "r"}
	var asked frontend.ContainerRequest
	fail := errors.New("no")
	b := &fakeBridge{result: &frontend.Result{Ref: ref}, container: func(req frontend.ContainerRequest) (frontend.Container, error) {
		asked = req
		return made, fail
	}}
	s := newServer(b)
	solved, err := s.Solve(t.Context(), &gwpb.SolveRequest{})
	must(t, err)
	req := &gwpb.NewContainerRequest{ContainerID: "c", Hostname: "h", Network: pb.NetMode_NONE, ExtraHosts: []*pb.HostIP{{Host: "x", IP: "1.1.1.1"}},
		Mounts: []*pb.Mount{{Dest: "/", ResultID: solved.Ref}, {Dest: "/x", ResultID: "of an error"}, nil}}
	_, err = s.NewContainer(t.Context(), req)
	if !errors.Is(err, fail) {
		t.Errorf("error %v", err)
	}
	fail = nil
	_, err = s.NewContainer(t.Context(), req) // the id is free again
	must(t, err)
	if asked.ID != "c" || asked.Hostname != "h" || asked.Network != pb.NetMode_NONE || len(asked.ExtraHosts) != 1 ||
		asked.Mounts[0].Ref != ref || asked.Mounts[1].Ref != nil || asked.Mounts[1].Mount.ResultID != "of an error" {
		t.Errorf("passed on %+v", asked)
	}
	_, err = s.NewContainer(t.Context(), req)
	wantCode(t, err, codes.AlreadyExists, "c")
	_, err = s.NewContainer(t.Context(), &gwpb.NewContainerRequest{})
	wantCode(t, err, codes.InvalidArgument, "ContainerID")

	data, err := s.ReadFileContainer(t.Context(), &gwpb.ReadFileRequest{Ref: "c", FilePath: "/f", MountIndex: 1})
	must(t, err)
	entries, err := s.ReadDirContainer(t.Context(), &gwpb.ReadDirRequest{Ref: "c", DirPath: "/d", IncludePattern: "*", MountIndex: 2})
	must(t, err)
	st, err := s.StatFileContainer(t.Context(), &gwpb.StatFileRequest{Ref: "c", Path: "/s", MountIndex: 3})
	must(t, err)
	if string(data.Data) != "1:/f" || !strings.HasPrefix(entries.Entries[0].Path, "2") || !strings.Contains(st.Stat.Path, "3") {
		t.Errorf("read %s, %v, %v", data.Data, entries, st)
	}

	_, err = s.ReleaseContainer(t.Context(), &gwpb.ReleaseContainerRequest{ContainerID: "c"})
	must(t, err)
	_, err = s.ReleaseContainer(t.Context(), &gwpb.ReleaseContainerRequest{ContainerID: "c"})
	wantCode(t, err, codes.NotFound, "c")
	_, err = s.ReadFileContainer(t.Context(), &gwpb.ReadFileRequest{Ref: "c"})
	wantCode(t, err, codes.NotFound, "c")
	if made.released != 1 {
		t.Errorf("released %d times", made.released)
	}
}
