package export

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strconv"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/filesync"
	"github.com/tonistiigi/fsutil"
	fstypes "github.com/tonistiigi/fsutil/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// sendFiles mirrors tree to the directory that the client gave for the exporter
// numbered id (SES-050, -051). When it returns nil, the client has said that
// everything arrived.
func sendFiles(ctx context.Context, caller session.Caller, id int, tree fsutil.FS) error {
	method := session.MethodURL(filesync.FileSend_ServiceDesc.ServiceName, "diffcopy")
	if !caller.Supports(method) {
		return errors.New("the client takes no files: it named no directory for the output")
	}
	count := &byteCount{scope: progress.From(ctx), started: time.Now()}
	ctx, cancel := context.WithCancelCause(caller.Context(ctx))
	ctx = metadata.AppendToOutgoingContext(ctx,
		"buildkit-attachable-exporter-id", strconv.Itoa(id),
		// All platforms come in one transfer: the client may delete what isn't in it.
		"buildkit-exporter-multi-platform", "1")
	stream, err := filesync.NewFileSendClient(caller.Conn()).DiffCopy(ctx)
	if err != nil {
		cancel(nil)
		return fmt.Errorf("open the client's output directory: %w", err)
	}
	in := newInbox(stream)
	defer func() { cancel(nil); <-in.ended }()
	if err := fsutil.Send(ctx, in, strictFS{tree, cancel}, count.report); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause // a file's, or the caller's
		}
		return fmt.Errorf("send files to the client: %w", in.why(err))
	}
	if err := context.Cause(ctx); err != nil {
		return fmt.Errorf("send files to the client: %w", err)
	}
	if err := stream.CloseSend(); err != nil {
		return fmt.Errorf("send files to the client: %w", err)
	}
	<-in.ended // the stream's context ends it, if nothing else does
	if err := in.why(nil); err != nil {
		return fmt.Errorf("send files to the client: %w", err)
	}
	return nil
}

// strictFS ends the transfer with the first file that can't be opened or read,
// or directory. fsutil would send an empty file in place of one that can't be
// opened, which the client keeps, and after any other error wait for the client,
// which waits for the rest.
type strictFS struct {
	fsutil.FS
	fail context.CancelCauseFunc
}

func (s strictFS) Open(path string) (io.ReadCloser, error) {
	f, err := s.FS.Open(path)
	if err != nil {
		err = fmt.Errorf("open %s: %w", path, err)
		s.fail(err)
		return io.NopCloser(failingReader{err}), nil
	}
	return strictFile{f, path, s.fail}, nil
}

func (s strictFS) Walk(ctx context.Context, target string, fn fs.WalkDirFunc) error {
	err := s.FS.Walk(ctx, target, fn)
	if err != nil {
		s.fail(err)
	}
	return err
}

type failingReader struct{ err error }

func (r failingReader) Read([]byte) (int, error) { return 0, r.err }

type strictFile struct {
	io.ReadCloser
	path string
	fail context.CancelCauseFunc
}

func (f strictFile) Read(p []byte) (int, error) {
	n, err := f.ReadCloser.Read(p)
	if err != nil && err != io.EOF {
		err = fmt.Errorf("read %s: %w", f.path, err)
		f.fail(err)
	}
	return n, err
}

// inbox is a stream that is always read from, whatever its user does: the
// sender stops taking requests while its answers are stuck behind the client's
// flow control, and the client stops taking answers while its requests are
// stuck. One side has to go on reading.
type inbox struct {
	grpc.ClientStream

	mu      sync.Mutex // guards the fields below
	packets []*fstypes.Packet
	err     error
	arrived chan struct{} // of capacity 1
	ended   chan struct{} // closed when nothing more will arrive
}

func newInbox(s grpc.ClientStream) *inbox {
	in := &inbox{ClientStream: s, arrived: make(chan struct{}, 1), ended: make(chan struct{})}
	go in.read() // ends with the stream's context at the latest
	return in
}

func (in *inbox) read() {
	defer close(in.ended)
	for {
		p := &fstypes.Packet{}
		err := in.ClientStream.RecvMsg(p)
		in.mu.Lock()
		if err != nil {
			in.err = err
		} else {
			in.packets = append(in.packets, p)
		}
		in.mu.Unlock()
		select {
		case in.arrived <- struct{}{}:
		default:
		}
		if err != nil {
			return
		}
	}
}

// why is the client's error if it gave one, else err: a sender whose stream was
// ended by the client knows only that it ended.
func (in *inbox) why(err error) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.err != nil && in.err != io.EOF && status.Code(in.err) != codes.Canceled {
		return in.err
	}
	return err
}

// RecvMsg gives the next packet that was read.
func (in *inbox) RecvMsg(m any) error {
	dst, ok := m.(*fstypes.Packet)
	if !ok {
		return fmt.Errorf("internal error: a packet stream was asked for a %T", m)
	}
	for {
		in.mu.Lock()
		if len(in.packets) > 0 {
			p := in.packets[0]
			in.packets = in.packets[1:]
			in.mu.Unlock()
			dst.Reset()
			dst.Type, dst.ID, dst.Data, dst.Stat = p.Type, p.ID, p.Data, p.Stat
			return nil
		}
		err := in.err
		in.mu.Unlock()
		if err != nil {
			return err
		}
		select {
		case <-in.arrived:
		case <-in.Context().Done():
			if err := context.Cause(in.Context()); err != nil {
				return err
			}
			return io.ErrUnexpectedEOF
		}
	}
}
