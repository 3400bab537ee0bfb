package ops

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/kilnbuild/kiln/internal/rootless"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/sshforward"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
)

// sshSocket mounts a socket whose connections are forwarded to a session,
// nothing if that is optional and no session forwards (LLB-048).
func (s *mountSet) sshSocket(ctx context.Context, opt *pb.SSHOpt) (source []mount.Mount, selector string, err error) {
	id := opt.ID
	if id == "" {
		id = sshforward.DefaultID
	}
	caller, err := sshCaller(ctx, s.ops.cfg.Sessions, s.group, id)
	if err != nil {
		if opt.Optional && ctx.Err() == nil {
			return nil, "", nil
		}
		return nil, "", err
	}
	dir, err := s.privateDir()
	if err != nil {
		return nil, "", err
	}
	name, path := dir.next()
	listener, err := listenPrivate(path, opt)
	if err != nil {
		return nil, "", fmt.Errorf("make socket for SSH key %q: %w", id, err)
	}
	f := &sshForward{caller: caller, id: id, listener: listener}
	s.undo.Add(f.start(ctx))
	return dir.bind(), name, nil
}

// ForwardAgent serves the SSH agent that the sessions of g know as id, at a
// socket at path, which only the daemon's user can connect to. It serves until
// stop is called, which waits for all connections to end.
func ForwardAgent(ctx context.Context, sessions *session.Manager, g session.Group, id, path string) (stop func() error, err error) {
	caller, err := sshCaller(ctx, sessions, g, id)
	if err != nil {
		return nil, err
	}
	listener, err := listenPrivate(path, &pb.SSHOpt{Uid: uint32(os.Geteuid()), Gid: uint32(os.Getegid()), Mode: 0o600})
	if err != nil {
		return nil, fmt.Errorf("make socket for SSH key %q: %w", id, err)
	}
	f := &sshForward{caller: caller, id: id, listener: listener}
	return f.start(ctx), nil
}

// sshCaller is the first session that forwards the key.
func sshCaller(ctx context.Context, sessions *session.Manager, g session.Group, id string) (caller session.Caller, err error) {
	err = sessions.Any(ctx, g, func(ctx context.Context, _ string, c session.Caller) error {
		if err := sshforward.CheckSSHID(ctx, c, id); err != nil {
			if grpcerrors.Code(err) == codes.Unimplemented {
				return fmt.Errorf("no SSH key %q forwarded from the client; it is with --ssh %s", id, id)
			}
			return fmt.Errorf("SSH key %q: %w", id, err)
		}
		caller = c
		return nil
	})
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return caller, err
}

func listenPrivate(path string, opt *pb.SSHOpt) (_ *net.UnixListener, err error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	if err := os.Chown(path, int(opt.Uid), int(opt.Gid)); err != nil {
		return nil, rootless.Here().Explain(err, int(opt.Uid), int(opt.Gid))
	}
	return l, os.Chmod(path, os.FileMode(opt.Mode&0o777))
}

// sshForward forwards the connections of one socket.
type sshForward struct {
	caller   session.Caller
	id       string
	listener *net.UnixListener
}

// start forwards until the returned function is called, which waits for all
// connections to end.
func (f *sshForward) start(ctx context.Context) (stop func() error) {
	ctx, cancel := context.WithCancel(f.caller.Context(ctx))
	var running sync.WaitGroup
	running.Go(func() {
		for {
			conn, err := f.listener.AcceptUnix()
			if err != nil {
				return // closed by stop
			}
			running.Go(func() { f.forward(ctx, conn) })
		}
	})
	return func() error {
		cancel()
		err := f.listener.Close()
		running.Wait()
		return err
	}
}

// forward serves one connection. What goes wrong is the step's process's to
// see, as the end of the connection.
func (f *sshForward) forward(ctx context.Context, conn *net.UnixConn) {
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	ctx = metadata.NewOutgoingContext(ctx, metadata.Pairs(sshforward.KeySSHID, f.id))
	stream, err := sshforward.NewSSHClient(f.caller.Conn()).ForwardAgent(ctx)
	if err != nil {
		conn.Close()
		return
	}
	sshforward.Copy(ctx, conn, stream, stream.CloseSend)
}
