package http

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
)

// maxSuffix bounds ChecksumRequest.Suffix.
const maxSuffix = 4 << 10

// ChecksumRequest asks for a digest of the file followed by Suffix.
type ChecksumRequest struct {
	Algorithm digest.Algorithm
	Suffix    []byte
}

// MetaRequest asks what a URL stands for.
type MetaRequest struct {
	Op       *pb.SourceOp
	Checksum *ChecksumRequest // nil for none
	Group    session.Group
}

// Meta is what a URL stands for.
type Meta struct {
	Digest       digest.Digest
	Filename     string
	LastModified *time.Time    // nil if the server didn't tell, or wasn't asked
	Checksum     digest.Digest // "" if it wasn't asked for
}

// ResolveMeta finds out what req names.
func (s *Source) ResolveMeta(ctx context.Context, req MetaRequest) (Meta, error) {
	i, err := s.instance(req.Op)
	if err != nil {
		return Meta{}, err
	}
	if c := req.Checksum; c != nil && len(c.Suffix) > maxSuffix {
		return Meta{}, fmt.Errorf("http checksum request suffix exceeds max size %d", maxSuffix)
	}
	a, err := i.answer(ctx, req.Group)
	if err != nil {
		return Meta{}, err
	}
	m := Meta{Digest: a.Digest, Filename: a.Name, LastModified: a.time()}
	if req.Checksum != nil {
		m.Checksum, err = i.digest(ctx, req.Group, *req.Checksum)
	}
	return m, err
}

// digest reads the file.
func (i *instance) digest(ctx context.Context, g session.Group, c ChecksumRequest) (_ digest.Digest, err error) {
	ref, f, err := i.get(ctx, g)
	if err != nil {
		return "", err
	}
	defer ref.Release()
	view, err := ref.Open(ctx)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, view.Close()) }()
	file, err := view.OpenFile(f.Name, 0, 0)
	if err != nil {
		return "", err
	}
	defer file.Close()
	sum := c.Algorithm.Digester()
	if _, err := io.Copy(sum.Hash(), file); err != nil {
		return "", fmt.Errorf("read %s: %w", i.spec.shown, err)
	}
	if _, err := sum.Hash().Write(c.Suffix); err != nil {
		return "", fmt.Errorf("hash a suffix: %w", err)
	}
	return sum.Digest(), nil
}
