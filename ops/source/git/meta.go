package git

import (
	"context"
	"fmt"
	"strings"

	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
)

// MetaRequest asks what a ref stands for.
type MetaRequest struct {
	Op      *pb.SourceOp
	Objects bool // fetch them, too
	Group   session.Group
}

// Meta is what a ref stands for.
type Meta struct {
	Ref    string // in full
	Object string // a commit or an annotated tag
	Commit string // what the tag is of; "" if Object is the commit, or nobody has looked
	// CommitObject and TagObject are as git stores them; nil if they weren't
	// asked for or there is none.
	CommitObject, TagObject []byte
}

// ResolveMeta finds out what req names.
func (s *Source) ResolveMeta(ctx context.Context, req MetaRequest) (meta Meta, err error) {
	i, err := s.instance(req.Op)
	if err != nil {
		return Meta{}, err
	}
	t, err := i.target(ctx, req.Group)
	if err != nil {
		return Meta{}, err
	}
	meta = Meta{Ref: t.ref, Object: t.object, Commit: t.commit}
	if !req.Objects {
		return meta, nil
	}
	err = s.withMirror(ctx, &i.spec, t, req.Group, func(m *mirror) error { return m.read(ctx, &meta) })
	return meta, err
}

// read adds the objects.
func (m *mirror) read(ctx context.Context, meta *Meta) error {
	kind, err := m.git(ctx, "cat-file", "-t", meta.Object)
	if err != nil {
		return err
	}
	commit := meta.Object
	switch kind := strings.TrimSpace(string(kind)); kind {
	case "commit":
		meta.Commit = ""
	case "tag":
		out, err := m.git(ctx, "rev-parse", meta.Object+"^{commit}")
		if err != nil {
			return err
		}
		commit = strings.TrimSpace(string(out))
		meta.Commit = commit
		if meta.TagObject, err = m.git(ctx, "cat-file", "tag", meta.Object); err != nil {
			return err
		}
	default:
		return fmt.Errorf("expected commit or tag object, got %s", kind)
	}
	meta.CommitObject, err = m.git(ctx, "cat-file", "commit", commit)
	return err
}
