package export

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	gofs "io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/filesync"
	"github.com/tonistiigi/fsutil"
	fstypes "github.com/tonistiigi/fsutil/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"
)

// client is a session.Caller whose services are served in this process.
type client struct {
	conn *grpc.ClientConn
}

func (c client) Context(ctx context.Context) context.Context { return ctx }
func (c client) Supports(string) bool                        { return true }
func (c client) Conn() *grpc.ClientConn                      { return c.conn }
func (c client) SharedKey() string                           { return "" }

var _ session.Caller = client{}

func newClient(t *testing.T, services ...session.Attachable) client {
	t.Helper()
	l := bufconn.Listen(1 << 16)
	srv := grpc.NewServer()
	for _, s := range services {
		s.Register(srv)
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:///client", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		srv.Stop()
		<-served
	})
	return client{conn}
}

// manyFiles is a tree of n files in one directory, each with its name inside.
type manyFiles int

func (n manyFiles) name(i int) string { return fmt.Sprintf("file-%06d", i) }

func (n manyFiles) Walk(_ context.Context, _ string, fn gofs.WalkDirFunc) error {
	for i := range int(n) {
		name := n.name(i)
		if err := fn(name, &fsutil.DirEntryInfo{Stat: &fstypes.Stat{Path: name, Mode: 0o644, Size: int64(len(name))}}, nil); err != nil {
			return err
		}
	}
	return nil
}

func (n manyFiles) Open(path string) (io.ReadCloser, error) {
	return io.NopCloser(strings.NewReader(path)), nil
}

// greedy is a client that asks for every file before it takes the content of
// any.
type greedy struct {
	filesync.UnimplementedFileSendServer
	received map[uint32]*bytes.Buffer
	md       metadata.MD
	fail     error // returned at once, if set
}

func (g *greedy) Register(s *grpc.Server) { filesync.RegisterFileSendServer(s, g) }

func (g *greedy) DiffCopy(stream filesync.FileSend_DiffCopyServer) error {
	if g.fail != nil {
		return g.fail
	}
	g.md, _ = metadata.FromIncomingContext(stream.Context())
	g.received = map[uint32]*bytes.Buffer{}
	files := uint32(0)
	for {
		var p fstypes.Packet
		if err := stream.RecvMsg(&p); err != nil {
			return err
		}
		if p.Type != fstypes.PACKET_STAT {
			return fmt.Errorf("packet %v before the list was over", p.Type)
		}
		if p.Stat == nil {
			break
		}
		files++
	}
	for id := range files {
		if err := stream.SendMsg(&fstypes.Packet{Type: fstypes.PACKET_REQ, ID: id}); err != nil {
			return err
		}
	}
	for open := files; open > 0; {
		var p fstypes.Packet
		if err := stream.RecvMsg(&p); err != nil {
			return err
		}
		if p.Type != fstypes.PACKET_DATA {
			return fmt.Errorf("unexpected packet %v", p.Type)
		}
		if len(p.Data) == 0 {
			open--
			continue
		}
		if g.received[p.ID] == nil {
			g.received[p.ID] = &bytes.Buffer{}
		}
		g.received[p.ID].Write(p.Data)
	}
	if err := stream.SendMsg(&fstypes.Packet{Type: fstypes.PACKET_FIN}); err != nil {
		return err
	}
	for {
		var p fstypes.Packet
		if err := stream.RecvMsg(&p); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// compat: SES-051, SES-053
func TestSendFilesToAClientThatAsksForAllAtOnce(t *testing.T) {
	const n = 30_000
	g := &greedy{}
	if err := sendFiles(t.Context(), newClient(t, g), 3, manyFiles(n)); err != nil {
		t.Fatal(err)
	}
	if len(g.received) != n {
		t.Fatalf("received %d of %d files", len(g.received), n)
	}
	for id, b := range g.received {
		if want := manyFiles(n).name(int(id)); b.String() != want {
			t.Fatalf("file %d is %q, want %q", id, b, want)
		}
	}
	if id, multi := g.md.Get("buildkit-attachable-exporter-id"), g.md.Get("buildkit-exporter-multi-platform"); id[0] != "3" || multi[0] != "1" {
		t.Errorf("metadata: id %v, multi-platform %v", id, multi)
	}
}

// The real receiver, which deletes what isn't in the transfer. compat: EXP-042
func TestSendFilesToADirectory(t *testing.T) {
	for _, c := range []struct {
		name   string
		target func(dir string) filesync.FSSyncTarget
		stays  bool
	}{
		{"Copy", func(dir string) filesync.FSSyncTarget { return filesync.WithFSSyncDir(0, dir) }, true},
		{"Delete", func(dir string) filesync.FSSyncTarget { return filesync.WithFSSyncDirDelete(0, dir) }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "old"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := sendFiles(t.Context(), newClient(t, filesync.NewFSSyncTarget(c.target(dir))), 0, manyFiles(50)); err != nil {
				t.Fatal(err)
			}
			for i := range 50 {
				name := manyFiles(50).name(i)
				if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != name {
					t.Fatalf("%s: %q, %v", name, got, err)
				}
			}
			if _, err := os.Stat(filepath.Join(dir, "old")); (err == nil) != c.stays {
				t.Errorf("the old file: %v", err)
			}
		})
	}
}

func TestSendFilesTellsTheClientsError(t *testing.T) {
	err := sendFiles(t.Context(), newClient(t, &greedy{fail: errors.New("the disk is full")}), 0, manyFiles(10))
	if err == nil || !strings.Contains(err.Error(), "the disk is full") {
		t.Fatalf("error %v", err)
	}
}

// unreadable is a tree with a file that can't be opened, or read.
type unreadable struct {
	manyFiles
	opens bool
}

var errDiskGone = errors.New("the disk is gone")

func (u unreadable) Open(path string) (io.ReadCloser, error) {
	switch {
	case path != u.name(7):
		return u.manyFiles.Open(path)
	case u.opens:
		return io.NopCloser(iotest.ErrReader(errDiskGone)), nil
	}
	return nil, errDiskGone
}

// A file that can't be read is not an empty one, and no reason to wait.
func TestSendFilesFailsWithItsFiles(t *testing.T) {
	for _, opens := range []bool{false, true} {
		err := sendFiles(t.Context(), newClient(t, &greedy{}), 0, unreadable{10, opens})
		if !errors.Is(err, errDiskGone) || !strings.Contains(err.Error(), "file-000007") {
			t.Errorf("error %v", err)
		}
	}
}

// stuck never takes anything.
type stuck struct {
	filesync.UnimplementedFileSendServer
	called chan struct{}
}

func (s *stuck) Register(g *grpc.Server) { filesync.RegisterFileSendServer(g, s) }

func (s *stuck) DiffCopy(stream filesync.FileSend_DiffCopyServer) error {
	close(s.called)
	<-stream.Context().Done()
	return stream.Context().Err()
}

func TestSendFilesEndsWithItsContext(t *testing.T) {
	s := &stuck{called: make(chan struct{})}
	c := newClient(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- sendFiles(ctx, c, 0, manyFiles(30_000)) }()
	<-s.called
	cancel()
	if err := <-done; err == nil {
		t.Fatal("no error")
	}
	buf := make([]byte, 1<<20)
	if stacks := string(buf[:runtime.Stack(buf, true)]); strings.Contains(stacks, "export.(*inbox).read") {
		t.Error("the reader of the stream is still there")
	}
}
