package gateway

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync"

	"github.com/kilnbuild/kiln/frontend"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// execProcess is a process that was asked for by a stream. The client is told
// (GW-055) Started, what the process prints, the end of each of its outputs,
// Exit, and Done, also if it could not be started.
type execProcess struct {
	x  *execStream
	id string

	fds      []uint32
	stdin    *io.PipeReader // nil if the process has none
	feed     *io.PipeWriter // its other end
	fed      bool           // the client sent the end; the handler's
	announce func()         // sends Started, once
	up       chan frontend.Process
	over     chan struct{} // closed when the process has ended
}

// File descriptors that a process can have.
const (
	fdStdin = iota
	fdStdout
	fdStderr
)

func newExecProcess(x *execStream, id string, init *gwpb.InitMessage) (*execProcess, error) {
	p := &execProcess{x: x, id: id, up: make(chan frontend.Process, 1), over: make(chan struct{})}
	p.announce = sync.OnceFunc(func() { p.send(&gwpb.ExecMessage{Input: &gwpb.ExecMessage_Started{Started: &gwpb.StartedMessage{}}}) })
	p.fds = slices.Compact(slices.Sorted(slices.Values(init.Fds)))
	for _, fd := range p.fds {
		if fd > fdStderr {
			return nil, status.Errorf(codes.InvalidArgument, "process %s: Init.Fds has %d; a process has 0, 1 and 2", id, fd)
		}
	}
	if slices.Contains(p.fds, fdStdin) {
		p.stdin, p.feed = io.Pipe()
	}
	return p, nil
}

// run runs the process and tells the client how it ends.
func (p *execProcess) run(c frontend.Container, init *gwpb.InitMessage) {
	req := frontend.ProcessRequest{
		Meta: init.Meta, SecretEnv: init.Secretenv, Security: init.Security, Terminal: init.Tty,
		Started: func(proc frontend.Process) {
			p.up <- proc
			p.announce()
		},
	}
	if p.stdin != nil {
		req.Stdin = p.stdin
	}
	for fd, w := range map[uint32]*io.Writer{fdStdout: &req.Stdout, fdStderr: &req.Stderr} {
		if slices.Contains(p.fds, fd) {
			*w = output{p, fd}
		}
	}
	err := c.Run(p.x.ctx, req)
	close(p.over)
	if p.stdin != nil {
		p.stdin.Close() // whatever the client sends now is of no interest
	}
	p.announce()
	for _, fd := range p.fds {
		if fd != fdStdin {
			p.send(&gwpb.ExecMessage{Input: &gwpb.ExecMessage_File{File: &gwpb.FdMessage{Fd: fd, EOF: true}}})
		}
	}
	p.send(&gwpb.ExecMessage{Input: &gwpb.ExecMessage_Exit{Exit: exitMessage(p.x.ctx, err)}})
	p.send(&gwpb.ExecMessage{Input: &gwpb.ExecMessage_Done{Done: &gwpb.DoneMessage{}}})
}

// exitMessage says how a process ended (GW-056).
func exitMessage(ctx context.Context, err error) *gwpb.ExitMessage {
	if err == nil {
		return &gwpb.ExitMessage{}
	}
	code := uint32(gwpb.UnknownExitStatus)
	var exit *gwpb.ExitError
	if errors.As(err, &exit) {
		code = exit.ExitCode
	}
	st := status.Convert(grpcerrors.ToGRPC(ctx, err)).Proto()
	return &gwpb.ExitMessage{Code: code, Error: &spb.Status{Code: st.GetCode(), Message: st.GetMessage(), Details: st.GetDetails()}}
}

// wait returns the process once it runs; nil if it has ended.
func (p *execProcess) wait(ctx context.Context) frontend.Process {
	select {
	case proc := <-p.up:
		p.up <- proc
		return proc
	case <-p.over:
	case <-ctx.Done():
	}
	return nil
}

// input passes on what the client sends. It waits until the process reads.
func (p *execProcess) input(m *gwpb.FdMessage) error {
	if m == nil || m.Fd != fdStdin || p.feed == nil || p.fed && len(m.Data) > 0 {
		return status.Errorf(codes.OutOfRange, "process %s: fd %d can't be written to", p.id, m.GetFd())
	}
	if _, err := p.feed.Write(m.Data); err != nil && !errors.Is(err, io.ErrClosedPipe) {
		return err
	}
	if m.EOF {
		p.endInput()
	}
	return nil
}

// endInput: there is no more input.
func (p *execProcess) endInput() {
	if p.feed != nil {
		p.fed = true
		p.feed.Close()
	}
}

// send waits until the client reads, or the stream ends: then nobody is there
// to be told.
func (p *execProcess) send(msg *gwpb.ExecMessage) bool {
	msg.ProcessID = p.id
	select {
	case p.x.out <- msg:
		return true
	case <-p.x.ctx.Done():
		return false
	}
}

// output sends what a process prints.
type output struct {
	p  *execProcess
	fd uint32
}

func (o output) Write(data []byte) (int, error) {
	o.p.announce()
	// A copy: it is sent when this call has returned.
	msg := &gwpb.ExecMessage{Input: &gwpb.ExecMessage_File{File: &gwpb.FdMessage{Fd: o.fd, Data: slices.Clone(data)}}}
	if !o.p.send(msg) {
		return 0, context.Cause(o.p.x.ctx)
	}
	return len(data), nil
}
