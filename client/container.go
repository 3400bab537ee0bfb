package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	fstypes "github.com/tonistiigi/fsutil/types"
	"google.golang.org/grpc/status"
)

// Container is a container in a build. It ends with the build at the latest.
type Container struct {
	g  *Gateway
	id string
}

// NewContainer makes the container that req describes, under the id in it.
func (g *Gateway) NewContainer(ctx context.Context, req *gwpb.NewContainerRequest) (*Container, error) {
	if _, err := g.bridge.NewContainer(g.named(ctx), req); err != nil {
		return nil, fmt.Errorf("make container %s: %w", req.ContainerID, err)
	}
	return g.Container(req.ContainerID), nil
}

// Container returns the container with the given id, which somebody has made.
func (g *Gateway) Container(id string) *Container { return &Container{g, id} }

// Release ends the container with all its processes.
func (c *Container) Release(ctx context.Context) error {
	if _, err := c.g.bridge.ReleaseContainer(c.g.named(ctx), &gwpb.ReleaseContainerRequest{ContainerID: c.id}); err != nil {
		return fmt.Errorf("release container %s: %w", c.id, err)
	}
	return nil
}

// StatFile describes a path in what the mount with the given index shows.
func (c *Container) StatFile(ctx context.Context, mount int, path string) (*fstypes.Stat, error) {
	resp, err := c.g.bridge.StatFileContainer(c.g.named(ctx), &gwpb.StatFileRequest{Ref: c.id, Path: path, MountIndex: int32(mount)})
	if err != nil {
		return nil, err
	}
	return resp.Stat, nil
}

// Process is a process to run in a container.
type Process struct {
	// Init describes it; the container and the file descriptors are filled in.
	Init *gwpb.InitMessage
	// Stdin is empty if nil. A Read that is under way when the process ends is
	// not waited for.
	Stdin          io.Reader
	Stdout, Stderr io.Writer // nil: discarded
	// Control are resize and signal messages for the process.
	Control <-chan *gwpb.ExecMessage
	// Started, if set, is called when the daemon says that the process runs.
	Started func()
}

// Run runs p to its end. The error is a *gwpb.ExitError if the process failed.
// When ctx ends, the process is killed.
func (c *Container) Run(ctx context.Context, p Process) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.g.bridge.ExecProcess(c.g.named(ctx))
	if err != nil {
		return fmt.Errorf("run a process in container %s: %w", c.id, err)
	}
	s := &processStream{stream: stream, p: p}
	err = s.run(c.id)
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// processID is what a stream calls its one process.
const processID = "process"

type processStream struct {
	p Process

	mu     sync.Mutex // serialises sends
	stream gwpb.LLBBridge_ExecProcessClient
}

func (s *processStream) run(container string) error {
	init := s.p.Init.CloneVT()
	init.ContainerID, init.Fds = container, nil
	for fd, used := range []bool{s.p.Stdin != nil, s.p.Stdout != nil, s.p.Stderr != nil} {
		if used {
			init.Fds = append(init.Fds, uint32(fd))
		}
	}
	// What can't be sent is told by the end of the stream.
	_ = s.send(&gwpb.ExecMessage{Input: &gwpb.ExecMessage_Init{Init: init}})
	if s.p.Stdin != nil {
		go s.feed() // ends with the stream, or with its Read
	}
	stopped := make(chan struct{})
	controlling := make(chan struct{})
	go func() {
		defer close(controlling)
		s.control(stopped)
	}()
	defer func() { close(stopped); <-controlling }()
	return s.receive()
}

func (s *processStream) send(m *gwpb.ExecMessage) error {
	m.ProcessID = processID
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stream.Send(m)
}

// feed sends what there is to read, and then its end.
func (s *processStream) feed() {
	file := func(m *gwpb.FdMessage) error {
		return s.send(&gwpb.ExecMessage{Input: &gwpb.ExecMessage_File{File: m}})
	}
	buf := make([]byte, 32<<10)
	for {
		n, rerr := s.p.Stdin.Read(buf)
		if n > 0 && file(&gwpb.FdMessage{Data: buf[:n]}) != nil {
			return // the stream has ended
		}
		if rerr != nil {
			_ = file(&gwpb.FdMessage{EOF: true}) // likewise
			return
		}
	}
}

func (s *processStream) control(stopped <-chan struct{}) {
	for {
		select {
		case m, ok := <-s.p.Control:
			if !ok || s.send(m) != nil {
				return
			}
		case <-stopped:
			return
		}
	}
}

// receive takes what the daemon says until the process is done.
func (s *processStream) receive() error {
	var exit error
	outputs := map[uint32]io.Writer{1: s.p.Stdout, 2: s.p.Stderr}
	for {
		msg, err := s.stream.Recv()
		if errors.Is(err, io.EOF) {
			return errors.New("the daemon ended the stream before the process was done")
		}
		if err != nil {
			return err
		}
		switch m := msg.Input.(type) {
		case *gwpb.ExecMessage_Started:
			if s.p.Started != nil {
				s.p.Started()
			}
		case *gwpb.ExecMessage_File:
			if w := outputs[m.File.GetFd()]; w != nil {
				if _, err := w.Write(m.File.GetData()); err != nil {
					return fmt.Errorf("write output of process: %w", err)
				}
			}
		case *gwpb.ExecMessage_Exit:
			exit = exitError(m.Exit)
		case *gwpb.ExecMessage_Done:
			return exit
		}
	}
}

func exitError(m *gwpb.ExitMessage) error {
	if m.GetCode() == 0 {
		return nil
	}
	err := errors.New("the daemon doesn't say why")
	if m.Error != nil {
		err = grpcerrors.FromGRPC(status.ErrorProto(m.Error))
	}
	if m.Code == gwpb.UnknownExitStatus {
		return err
	}
	return &gwpb.ExitError{ExitCode: m.Code, Err: err}
}
