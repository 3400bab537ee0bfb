package ocilayout

import (
	"context"
	"io"

	api "github.com/containerd/containerd/api/services/content/v1"
	"github.com/moby/buildkit/session"
	sessioncontent "github.com/moby/buildkit/session/content"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/metadata"
)

// reader reads a blob from start to end in one call of the content service.
type reader struct {
	stream  api.Content_ReadClient
	cancel  context.CancelFunc
	rest    []byte
	explain func(error) error
}

// open starts to read dgst. It waits for the first bytes, so that a store
// without the blob is an error here.
func open(ctx context.Context, c session.Caller, store string, dgst digest.Digest) (*reader, error) {
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(ctx, sessioncontent.GRPCHeaderID, store))
	stream, err := api.NewContentClient(c.Conn()).Read(ctx, &api.ReadContentRequest{Digest: dgst.String()})
	if err != nil {
		cancel()
		return nil, err
	}
	r := &reader{stream: stream, cancel: cancel}
	if err := r.next(); err != nil && err != io.EOF {
		cancel()
		return nil, err
	}
	return r, nil
}

// OpenBlob starts to read dgst from the store that c names so. Its bytes aren't
// verified.
func OpenBlob(ctx context.Context, c session.Caller, store string, dgst digest.Digest) (io.ReadCloser, error) {
	r, err := open(ctx, c, store, dgst)
	if err != nil {
		return nil, err
	}
	r.explain = func(err error) error { return err }
	return r, nil
}

func (r *reader) next() error {
	resp, err := r.stream.Recv()
	if err != nil {
		return err
	}
	r.rest = resp.Data
	return nil
}

// Read implements io.Reader.
func (r *reader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		err := r.next()
		if err == io.EOF {
			return 0, io.EOF
		}
		if err != nil {
			return 0, r.explain(err)
		}
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// Close ends the call.
func (r *reader) Close() error {
	r.cancel()
	return nil
}
