package llb

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"strconv"
	"strings"

	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/apicaps"
	"github.com/opencontainers/go-digest"
)

// source is the vertex of everything that comes from outside. Options set its
// attributes and demand the capabilities for them.
type source struct {
	id          string
	attrs       map[string]string
	constraints Constraints
	err         error // found while building; reported by Marshal

	git gitSource // used by Git alone
}

// set gives an attribute a value; an empty value is no attribute.
func (s *source) set(attr, value string, caps ...apicaps.CapID) {
	if value == "" {
		delete(s.attrs, attr)
		return
	}
	s.attrs[attr] = value
	s.constraints.need(caps...)
}

// setList is set for a list, which the wire carries as JSON.
func (s *source) setList(attr string, list []string, caps ...apicaps.CapID) {
	if len(list) == 0 {
		s.set(attr, "")
		return
	}
	dt, err := json.Marshal(list)
	if err != nil {
		s.fail(fmt.Errorf("encode %s: %w", attr, err))
		return
	}
	s.set(attr, string(dt), caps...)
}

func (s *source) fail(err error) {
	if s.err == nil {
		s.err = err
	}
}

// state finishes the source.
func (s *source) state(caps ...apicaps.CapID) State {
	s.constraints.need(caps...)
	return newState(&output{vertex: s, platform: s.constraints.platform})
}

func (s *source) marshal(m *marshaller) (*pb.Op, Constraints, error) {
	if s.err != nil {
		return nil, Constraints{}, s.err
	}
	if s.id == "" {
		return nil, Constraints{}, errors.New("source identifier can't be empty")
	}
	c, attrs := s.constraints.clone(), s.attrs
	if strings.HasPrefix(s.id, "local://") && attrs[pb.AttrLocalSessionID] == "" {
		attrs = maps.Clone(attrs)
		attrs[pb.AttrLocalUniqueID] = c.localID
		if c.localID == "" {
			attrs[pb.AttrLocalUniqueID] = m.defaults.localID
		}
		c.need(pb.CapSourceLocalUnique)
	}
	op := &pb.Op{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: s.id, Attrs: attrs}}}
	if strings.HasPrefix(s.id, "docker-image://") || strings.HasPrefix(s.id, "oci-layout://") {
		op.Platform = m.platform(c.platform)
	}
	return op, c, nil
}

// SourceOp returns the source that st is, unchanged by any operation, or nil
// if it is none.
func SourceOp(st State) *pb.SourceOp {
	if st.out == nil {
		return nil
	}
	s, ok := st.out.vertex.(*source)
	if !ok {
		return nil
	}
	return &pb.SourceOp{Identifier: s.id, Attrs: maps.Clone(s.attrs)}
}

// Source is any source, by its identifier and attributes.
func Source(id string, attrs map[string]string, opts ...ConstraintsOpt) State {
	s := &source{id: id, attrs: map[string]string{}, constraints: newConstraints(opts)}
	maps.Copy(s.attrs, attrs)
	return s.state()
}

// LocalOption is an option of Local.
type LocalOption interface{ applyLocal(*source) }

type localOption func(*source)

func (o localOption) applyLocal(s *source) { o(s) }

// Local is a directory of the client, by the name the client gave it.
func Local(name string, opts ...LocalOption) State {
	s := &source{id: "local://" + name, attrs: map[string]string{}}
	for _, o := range opts {
		o.applyLocal(s)
	}
	return s.state(pb.CapSourceLocal)
}

// SessionID names the session that the directory comes from.
func SessionID(id string) LocalOption {
	return localOption(func(s *source) { s.set(pb.AttrLocalSessionID, id, pb.CapSourceLocalSessionID) })
}

// IncludePatterns limits the directory to paths that match.
func IncludePatterns(patterns []string) LocalOption {
	return localOption(func(s *source) {
		s.setList(pb.AttrIncludePatterns, patterns, pb.CapSourceLocalIncludePatterns)
	})
}

// ExcludePatterns leaves out paths that match.
func ExcludePatterns(patterns []string) LocalOption {
	return localOption(func(s *source) {
		s.setList(pb.AttrExcludePatterns, patterns, pb.CapSourceLocalExcludePatterns)
	})
}

// FollowPaths limits the directory to paths and what their symlinks lead to.
func FollowPaths(paths []string) LocalOption {
	return localOption(func(s *source) { s.setList(pb.AttrFollowPaths, paths, pb.CapSourceLocalFollowPaths) })
}

// SharedKeyHint lets sources with the same hint reuse each other's transfer.
func SharedKeyHint(hint string) LocalOption {
	return localOption(func(s *source) { s.set(pb.AttrSharedKeyHint, hint, pb.CapSourceLocalSharedKeyHint) })
}

// DiffType says how changed files are found.
type DiffType string

// The ways to find changed files.
const (
	DiffNone     DiffType = pb.AttrLocalDifferNone     // transfer everything
	DiffMetadata DiffType = pb.AttrLocalDifferMetadata // compare size, time, mode, owner, links
)

// Differ sets how changed files are found; required makes daemons that can't
// refuse the definition.
func Differ(t DiffType, required bool) LocalOption {
	return localOption(func(s *source) {
		s.set(pb.AttrLocalDiffer, string(t))
		if required {
			s.constraints.need(pb.CapSourceLocalDiffer)
		}
	})
}

// MetadataOnlyTransfer transfers no contents, but for the paths in except.
func MetadataOnlyTransfer(except []string) LocalOption {
	return localOption(func(s *source) {
		s.set(pb.AttrMetadataTransfer, "true", pb.CapSourceMetadataTransfer)
		s.setList(pb.AttrMetadataTransferExclude, except)
	})
}

// HTTPOption is an option of HTTP.
type HTTPOption interface{ applyHTTP(*source) }

type httpOption func(*source)

func (o httpOption) applyHTTP(s *source) { o(s) }

// HTTP is a file downloaded from url.
func HTTP(url string, opts ...HTTPOption) State {
	s := &source{id: url, attrs: map[string]string{}}
	for _, o := range opts {
		o.applyHTTP(s)
	}
	return s.state(pb.CapSourceHTTP)
}

// Checksum is the digest that the download must have; "" is any.
func Checksum(dgst digest.Digest) HTTPOption {
	return httpOption(func(s *source) {
		s.set(pb.AttrHTTPChecksum, string(dgst), pb.CapSourceHTTPChecksum)
	})
}

// Header sets the Accept and User-Agent headers of the request; "" is the
// default.
func Header(accept, userAgent string) HTTPOption {
	return httpOption(func(s *source) {
		s.set(pb.AttrHTTPHeaderPrefix+"accept", accept)
		s.set(pb.AttrHTTPHeaderPrefix+"user-agent", userAgent)
		s.constraints.need(pb.CapSourceHTTPHeader)
	})
}

// VerifyPGPSignature makes the download pass only if signature, detached and
// armored, was made on it by pubKey.
func VerifyPGPSignature(pubKey, signature []byte) HTTPOption {
	return httpOption(func(s *source) {
		s.set(pb.AttrHTTPSignatureVerifyPubKey, string(pubKey))
		s.set(pb.AttrHTTPSignatureVerify, string(signature))
		s.constraints.need(pb.CapSourceHTTPSignatureVerify)
	})
}

// FileInfoOption is an option of the sources that make a single file.
type FileInfoOption interface {
	HTTPOption
	BlobOption
}

// fileInfoOption has caps for HTTP alone: blobs always had these attributes.
type fileInfoOption func(s *source, http bool)

func (o fileInfoOption) applyHTTP(s *source) { o(s, true) }
func (o fileInfoOption) applyBlob(s *source) { o(s, false) }

// Filename names the file.
func Filename(name string) FileInfoOption {
	return fileInfoOption(func(s *source, _ bool) { s.set(pb.AttrHTTPFilename, name) })
}

// Chmod sets the permissions of the file.
func Chmod(perm os.FileMode) FileInfoOption {
	return fileInfoOption(func(s *source, http bool) {
		if perm &= 0o777; perm == 0 {
			return
		}
		s.set(pb.AttrHTTPPerm, "0"+strconv.FormatInt(int64(perm), 8))
		if http {
			s.constraints.need(pb.CapSourceHTTPPerm)
		}
	})
}

// Chown sets the owner of the file.
func Chown(uid, gid int) FileInfoOption {
	return fileInfoOption(func(s *source, http bool) {
		for attr, id := range map[string]int{pb.AttrHTTPUID: uid, pb.AttrHTTPGID: gid} {
			if id == 0 {
				continue
			}
			s.set(attr, strconv.Itoa(id))
			if http {
				s.constraints.need(pb.CapSourceHTTPUIDGID)
			}
		}
	})
}
