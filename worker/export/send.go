package export

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/filesync"
	"github.com/tonistiigi/fsutil"
	fstypes "github.com/tonistiigi/fsutil/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// sendFiles mirrors tree to the directory that the client gave for the exporter
// numbered id (SES-050, -051).
func sendFiles(ctx context.Context, caller session.Caller, id int, tree fsutil.FS) error {
	method := session.MethodURL(filesync.FileSend_ServiceDesc.ServiceName, "diffcopy")
	if !caller.Supports(method) {
		return errors.New("the client takes no files: it named no directory for the output")
	}
	ctx, cancel := context.WithCancel(caller.Context(ctx))
	defer cancel()
	ctx = metadata.AppendToOutgoingContext(ctx, "buildkit-attachable-exporter-id", strconv.Itoa(id))
	stream, err := filesync.NewFileSendClient(caller.Conn()).DiffCopy(ctx)
	if err != nil {
		return fmt.Errorf("open the client's output directory: %w", err)
	}
	count := &byteCount{scope: progress.From(ctx), started: time.Now()}
	in := newInbox(stream)
	err = fsutil.Send(ctx, in, tree, count.report)
	if err == nil {
		err = stream.CloseSend()
	}
	if err != nil {
		return fmt.Errorf("send files to the client: %w", err)
	}
	return nil
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
}

func newInbox(s grpc.ClientStream) *inbox {
	in := &inbox{ClientStream: s, arrived: make(chan struct{}, 1)}
	go in.read() // ends with the stream's context
	return in
}

func (in *inbox) read() {
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
