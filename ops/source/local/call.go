package local

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"unicode"

	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/filesync"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/tonistiigi/fsutil/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
)

// call starts a transfer with the session's client. It ends with ctx.
func (i *instance) call(ctx context.Context, c session.Caller) (grpc.ClientStream, error) {
	if !c.Supports(session.MethodURL(filesync.FileSync_ServiceDesc.ServiceName, "diffcopy")) {
		return nil, errors.New("the client offers no local files")
	}
	md := metadata.MD{}
	addValues(md, "dir-name", []string{i.name})
	addValues(md, "include-patterns", i.includes)
	addValues(md, "exclude-patterns", i.excludes)
	addValues(md, "followpaths", i.follow)
	return filesync.NewFileSyncClient(c.Conn()).DiffCopy(metadata.NewOutgoingContext(ctx, md), grpc.ForceCodecV2(packets{}))
}

// addValues adds a request header. Values that aren't ASCII are encoded, all of
// them, and a second header says so (SES-031).
func addValues(md metadata.MD, key string, values []string) {
	if len(values) == 0 {
		return
	}
	encode := false
	for _, v := range values {
		for _, r := range v {
			encode = encode || r > unicode.MaxASCII
		}
	}
	out := append([]string(nil), values...)
	if encode {
		for i, v := range out {
			out[i] = url.QueryEscape(v)
		}
		md.Set(key+"-encoded", "1")
	}
	md.Set(key, out...)
}

// unknownDir tells whether the client doesn't offer the directory, so that
// another session may (SES-032).
func unknownDir(err error) bool { return grpcerrors.Code(err) == codes.NotFound }

// explain says what a failed transfer means.
func (i *instance) explain(err error) error {
	if unknownDir(err) {
		return fmt.Errorf("the client doesn't offer a local directory named %q (pass one with --local %s=<path>): %w", i.name, i.name, err)
	}
	return fmt.Errorf("transfer local directory %q: %w", i.name, err)
}

// packets is the protobuf codec, without reflection, for the one message of
// the transfer protocol.
type packets struct{}

var _ encoding.CodecV2 = packets{}

// Name is the usual codec's: the wire format is the same.
func (packets) Name() string { return "proto" }

func (packets) Marshal(v any) (mem.BufferSlice, error) {
	p, ok := v.(*types.Packet)
	if !ok {
		return nil, fmt.Errorf("internal error: %T sent in a file transfer", v)
	}
	raw, err := p.MarshalVT()
	if err != nil {
		return nil, err
	}
	return mem.BufferSlice{mem.SliceBuffer(raw)}, nil
}

func (packets) Unmarshal(data mem.BufferSlice, v any) error {
	p, ok := v.(*types.Packet)
	if !ok {
		return fmt.Errorf("internal error: %T received in a file transfer", v)
	}
	buf := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer buf.Free()
	return p.UnmarshalVT(buf.ReadOnlyData())
}
