// Package local is the source of the client's own files: local://name.
//
// The client walks its directory and streams what it finds, in order; what
// differs from the copy of last time is asked for and written (receive.go).
// The copy is a record that is kept, and reopened for the next transfer of the
// same directory of the same client unless something still uses it: then a
// fresh one is made. A transfer that fails takes its record with it.
//
// The stream comes from outside and is not trusted: paths are checked, and
// nothing is created through a symbolic link (tree.go).
package local

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/ops"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/patternmatcher"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const scheme = "local"

// Options are what a Source works with.
type Options struct {
	Cache    *cache.Manager
	Sessions *session.Manager
}

// Source serves local.
type Source struct{ opts Options }

var _ ops.Source = (*Source)(nil)

// New returns a source.
func New(opts Options) *Source { return &Source{opts} }

// Schemes implements ops.Source.
func (s *Source) Schemes() []string { return []string{scheme} }

// Resolve implements ops.Source.
func (s *Source) Resolve(op *pb.SourceOp, _ ocispec.Platform) (ops.SourceInstance, error) {
	_, name, _ := strings.Cut(op.Identifier, "://")
	i := &instance{opts: s.opts, name: name}
	if err := i.readAttrs(op.Attrs); err != nil {
		return nil, fmt.Errorf("%s: %w", op.Identifier, err)
	}
	return i, nil
}

// instance is one local source op (LLB-098).
type instance struct {
	opts    Options
	name    string // of the directory at the client
	session string // "" is any that waits

	includes, excludes, follow []string
	keyHint                    string
	everything                 bool // transfer what didn't change, too

	metadataOnly bool
	exceptions   []string
	excepted     *patternmatcher.PatternMatcher // of what has data all the same; may be nil
}

func (i *instance) readAttrs(attrs map[string]string) error {
	if id := attrs[pb.AttrLocalSessionID]; id != "" {
		i.session = id
		if prefix, rest, ok := strings.Cut(id, ":"); ok {
			i.name, i.session = prefix+"-"+i.name, rest
		}
	}
	for attr, to := range map[string]*[]string{
		pb.AttrIncludePatterns:         &i.includes,
		pb.AttrExcludePatterns:         &i.excludes,
		pb.AttrFollowPaths:             &i.follow,
		pb.AttrMetadataTransferExclude: &i.exceptions,
	} {
		if v, ok := attrs[attr]; ok {
			if err := json.Unmarshal([]byte(v), to); err != nil {
				return fmt.Errorf("%s must be a JSON list of strings: %w", attr, err)
			}
		}
	}
	i.keyHint = attrs[pb.AttrSharedKeyHint]
	switch v := attrs[pb.AttrLocalDiffer]; v {
	case "", pb.AttrLocalDifferMetadata:
	case pb.AttrLocalDifferNone:
		i.everything = true
	default:
		return fmt.Errorf("%s: %q is neither none nor metadata", pb.AttrLocalDiffer, v)
	}
	if v, ok := attrs[pb.AttrMetadataTransfer]; ok {
		only, err := strconv.ParseBool(v)
		if err != nil {
			return fmt.Errorf("invalid value for %s: %q", pb.AttrMetadataTransfer, v)
		}
		i.metadataOnly = only
	}
	if i.metadataOnly && len(i.exceptions) > 0 {
		m, err := patternmatcher.New(i.exceptions)
		if err != nil {
			return fmt.Errorf("%s: %w", pb.AttrMetadataTransferExclude, err)
		}
		i.excepted = m
	}
	return nil
}

// CacheKey says whose files are meant, not what they are: the prefix tells that
// only content can match (LLB-158). It is upstream's, byte for byte.
func (i *instance) CacheKey(ctx context.Context, g session.Group, index int) (string, bool, error) {
	if index != 0 {
		return "", false, fmt.Errorf("internal error: key %d of local source %s, which has one", index, i.name)
	}
	id := i.session
	if id == "" {
		if ids := session.AllSessionIDs(g); len(ids) > 0 {
			id = ids[0]
		}
	}
	if id == "" {
		return "", false, errors.New("could not access local files without session")
	}
	raw, err := json.Marshal(struct {
		SessionID          string
		IncludePatterns    []string
		ExcludePatterns    []string
		FollowPaths        []string
		MetadataTransfer   bool     `json:",omitempty"`
		MetadataExceptions []string `json:",omitempty"`
	}{id, i.includes, i.excludes, i.follow, i.metadataOnly, i.exceptions})
	if err != nil {
		return "", false, fmt.Errorf("encode cache key: %w", err)
	}
	return "session:" + i.name + ":" + digest.FromBytes(raw).String(), false, nil
}
