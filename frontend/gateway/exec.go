package gateway

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync"

	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/sys/signal"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// execStream is one call of ExecProcess: a number of processes that the client
// started by it. When it breaks off they are killed; when the client has no
// more to say, they go on without input.
//
//	handler    takes what the client said, in order; it waits when a process
//	           doesn't read its input
//	receiver   reads from the stream
//	sender     writes to it; while the client doesn't read, processes wait
//	processes  one goroutine each
//
// The receiver and the sender may be blocked in gRPC, which lets go of them when
// the handler returns. All others are waited for.
type execStream struct {
	server *Server
	ctx    context.Context // ends with the stream or the build
	cancel context.CancelCauseFunc
	out    chan *gwpb.ExecMessage

	processes map[string]*execProcess // the handler's; those that ended, too
	running   sync.WaitGroup
}

// ExecProcess runs processes in containers (GW-053).
func (s *Server) ExecProcess(stream gwpb.LLBBridge_ExecProcessServer) error {
	x := &execStream{server: s, out: make(chan *gwpb.ExecMessage), processes: map[string]*execProcess{}}
	x.ctx, x.cancel = context.WithCancelCause(stream.Context())
	in, failed := make(chan *gwpb.ExecMessage), make(chan error, 2)
	go func() { failed <- x.receive(stream, in) }()
	go func() { failed <- x.send(stream) }()
	err := x.handle(in, failed)
	x.cancel(errStreamEnded)
	x.running.Wait()
	return err
}

var errStreamEnded = errors.New("the stream that the process was started by has ended")

func (x *execStream) receive(stream gwpb.LLBBridge_ExecProcessServer, in chan<- *gwpb.ExecMessage) error {
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			close(in)
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case in <- msg:
		case <-x.ctx.Done():
			return nil
		}
	}
}

// send ends when out is closed, or with the stream.
func (x *execStream) send(stream gwpb.LLBBridge_ExecProcessServer) error {
	for {
		select {
		case msg, ok := <-x.out:
			if !ok {
				return errAllSent
			}
			if err := stream.Send(msg); err != nil {
				return err
			}
		case <-x.ctx.Done():
			return nil
		}
	}
}

// errAllSent is how the sender ends well.
var errAllSent = errors.New("everything was sent")

// handle takes messages until there are none and all processes have ended.
func (x *execStream) handle(in <-chan *gwpb.ExecMessage, failed <-chan error) error {
	ended := make(chan struct{})
	for {
		select {
		case msg, ok := <-in:
			if !ok {
				in = nil
				for _, p := range x.processes {
					p.endInput()
				}
				go func() { x.running.Wait(); close(ended) }()
				continue
			}
			if err := x.message(msg); err != nil {
				return err
			}
		case <-ended:
			ended = nil
			close(x.out)
		case err := <-failed:
			if errors.Is(err, errAllSent) {
				return nil
			}
			if err != nil {
				return err
			}
		case <-x.ctx.Done():
			return context.Cause(x.ctx)
		}
	}
}

// message takes one message. An error ends the stream, as it does upstream:
// what the client means can't be told any more.
func (x *execStream) message(msg *gwpb.ExecMessage) error {
	id := msg.ProcessID
	if id == "" {
		return missing("ProcessID")
	}
	p := x.processes[id]
	if init := msg.GetInit(); init != nil {
		if p != nil {
			return status.Errorf(codes.AlreadyExists, "process %s already exists", id)
		}
		return x.start(id, init)
	}
	if p == nil {
		return status.Errorf(codes.NotFound, "no process %q was started by this stream", id)
	}
	switch m := msg.Input.(type) {
	case *gwpb.ExecMessage_File:
		return p.input(m.File)
	case *gwpb.ExecMessage_Resize:
		rows, cols := m.Resize.GetRows(), m.Resize.GetCols()
		if rows > maxSize || cols > maxSize {
			return status.Errorf(codes.InvalidArgument, "Resize: a terminal can't have %d rows and %d columns", rows, cols)
		}
		if proc := p.wait(x.ctx); proc != nil {
			return proc.Resize(uint16(rows), uint16(cols))
		}
		return nil
	case *gwpb.ExecMessage_Signal:
		sig, ok := signal.SignalMap[strings.TrimPrefix(m.Signal.GetName(), "SIG")]
		if !ok {
			return status.Errorf(codes.InvalidArgument, "Signal: unknown signal %q", m.Signal.GetName())
		}
		if proc := p.wait(x.ctx); proc != nil {
			return proc.Signal(sig)
		}
		return nil
	}
	return status.Errorf(codes.InvalidArgument, "process %s: a message of type %T is not one that a client sends", id, msg.Input)
}

// maxSize is what a terminal's rows and columns are counted with.
const maxSize = 1<<16 - 1

func (x *execStream) start(id string, init *gwpb.InitMessage) error {
	if init.Meta == nil {
		return missing("Init.Meta")
	}
	c, err := x.server.container(init.ContainerID)
	if err != nil {
		return err
	}
	p, err := newExecProcess(x, id, init)
	if err != nil {
		return err
	}
	x.processes[id] = p
	x.running.Go(func() { p.run(c, init) })
	return nil
}
