package gateway

import (
	"github.com/kilnbuild/kiln/frontend"
	"github.com/kilnbuild/kiln/ops/source/http"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// checksumAlgorithms are those that the protocol has.
var checksumAlgorithms = map[gwpb.ChecksumRequest_ChecksumAlgo]digest.Algorithm{
	gwpb.ChecksumRequest_CHECKSUM_ALGO_SHA256: digest.SHA256,
	gwpb.ChecksumRequest_CHECKSUM_ALGO_SHA384: digest.SHA384,
	gwpb.ChecksumRequest_CHECKSUM_ALGO_SHA512: digest.SHA512,
}

func checksumRequest(req *gwpb.ChecksumRequest) (*http.ChecksumRequest, error) {
	if req == nil {
		return nil, nil
	}
	algorithm, ok := checksumAlgorithms[req.Algo]
	if !ok {
		return nil, status.Errorf(codes.InvalidArgument, "unsupported checksum algorithm %d", req.Algo)
	}
	return &http.ChecksumRequest{Algorithm: algorithm, Suffix: req.Suffix}, nil
}

// SourceMeta answers req, also for whoever asks in the same terms elsewhere.
func SourceMeta(req *gwpb.ResolveSourceMetaRequest, resolve func(frontend.MetaOptions) (*frontend.SourceMeta, error)) (*gwpb.ResolveSourceMetaResponse, error) {
	checksum, err := checksumRequest(req.HTTP.GetChecksumRequest())
	if err != nil {
		return nil, err
	}
	meta, err := resolve(frontend.MetaOptions{
		Platform:    platformOf(req.Platform),
		LogName:     req.LogName,
		ResolveMode: req.ResolveMode,
		NoConfig:    req.Image.GetNoConfig(),
		Objects:     req.Git.GetReturnObject(),
		Checksum:    checksum,
		Policies:    req.SourcePolicies,
	})
	if err != nil {
		return nil, err
	}
	return sourceMeta(meta, checksum), nil
}

// sourceMeta is the answer to ResolveSourceMeta (GW-024).
func sourceMeta(meta *frontend.SourceMeta, checksum *http.ChecksumRequest) *gwpb.ResolveSourceMetaResponse {
	out := &gwpb.ResolveSourceMetaResponse{Source: meta.Op}
	if meta.Digest != "" {
		out.Image = &gwpb.ResolveSourceImageResponse{Digest: meta.Digest.String(), Config: meta.Config}
	}
	if g := meta.Git; g != nil {
		out.Git = &gwpb.ResolveSourceGitResponse{
			Checksum: g.Object, Ref: g.Ref, CommitChecksum: g.Commit, CommitObject: g.CommitObject, TagObject: g.TagObject,
		}
	}
	if h := meta.HTTP; h != nil {
		out.HTTP = &gwpb.ResolveSourceHTTPResponse{Checksum: h.Digest.String(), Filename: h.Filename}
		if h.LastModified != nil {
			out.HTTP.LastModified = timestamppb.New(*h.LastModified)
		}
		if h.Checksum != "" {
			out.HTTP.ChecksumResponse = &gwpb.ChecksumResponse{Digest: h.Checksum.String(), Suffix: checksum.Suffix}
		}
	}
	return out
}
