package http

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	stdhttp "net/http"
	"net/url"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/kilnbuild/kiln/ops/source/onefile"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
)

// spec is what one op asks for.
type spec struct {
	url      *url.URL
	shown    string // the URL without its password
	file     onefile.Attrs
	checksum digest.Digest // "" is any
	secret   string        // of the Authorization header; "" is one named for the host
	headers  []header      // sorted
}

// header is a field, with upstream's names, as it is hashed.
type header struct{ Name, Value string }

// honoured are the headers that an op may set (LLB-114).
var honoured = []string{"Accept", "User-Agent"}

// parseSpec reads an op (LLB-110 to -114).
func parseSpec(op *pb.SourceOp) (s spec, err error) {
	if s.url, err = url.Parse(op.Identifier); err != nil {
		return spec{}, fmt.Errorf("the URL can't be parsed: %w", withoutURL(err))
	}
	if s.url.Host == "" {
		return spec{}, errors.New("the URL names no host")
	}
	s.shown = s.url.Redacted()
	if s.file, err = onefile.ParseAttrs(op.Attrs); err != nil {
		return spec{}, err
	}
	for name, v := range op.Attrs {
		switch name {
		case pb.AttrHTTPChecksum:
			if s.checksum, err = digest.Parse(v); err != nil {
				return spec{}, fmt.Errorf("%s: %q: %w", name, v, err)
			}
		case pb.AttrHTTPAuthHeaderSecret:
			s.secret = v
		case pb.AttrHTTPSignatureVerify, pb.AttrHTTPSignatureVerifyPubKey:
			// Who sets it all the same must not get less than was asked for.
			return spec{}, fmt.Errorf("%s is not supported by this daemon", name)
		}
		if field, ok := strings.CutPrefix(name, pb.AttrHTTPHeaderPrefix); ok {
			if field = stdhttp.CanonicalHeaderKey(field); slices.Contains(honoured, field) {
				s.headers = append(s.headers, header{field, v})
			}
		}
	}
	slices.SortFunc(s.headers, func(a, b header) int { return cmp.Compare(a.Name, b.Name) })
	return s, nil
}

// withoutURL is an error of net/url or net/http without the URL, which may have
// a password in it.
func withoutURL(err error) error {
	var ue *url.Error
	if errors.As(err, &ue) {
		return ue.Err
	}
	return err
}

// key identifies what was or will be downloaded. It is upstream's, byte for byte
// (LLB-157).
func (s *spec) key(a answer) (string, error) {
	raw, err := json.Marshal(struct {
		Filename         string
		Perm, UID, GID   int
		Checksum         digest.Digest
		LastModTime      string   `json:",omitempty"`
		AuthHeaderSecret string   `json:",omitempty"`
		Header           []header `json:",omitempty"`
	}{a.Name, s.file.Perm, s.file.UID, s.file.GID, a.Digest, a.lastModified(), s.secret, s.headers})
	if err != nil {
		return "", fmt.Errorf("encode cache key: %w", err)
	}
	return digest.FromBytes(raw).String(), nil
}

// place is the same for ops to which the same file is due.
func (s *spec) place() (string, error) {
	u := *s.url
	u.User = nil // no password is stored, not even hashed
	return identity([]any{u.String(), s.url.User.Username(), s.file, s.secret, s.headers})
}

// question is the same for ops that ask a server the same.
type question string

func (s *spec) question() (question, error) {
	q, err := identity([]any{s.url.String(), s.secret, s.headers})
	return question(q), err
}

func identity(of []any) (string, error) {
	raw, err := json.Marshal(of)
	if err != nil {
		return "", fmt.Errorf("encode URL: %w", err)
	}
	return digest.FromBytes(raw).String(), nil
}

// answer is what a server gave, as it is stored beside the file.
type answer struct {
	Digest   digest.Digest
	Name     string // of the file
	Offered  string // what its name is unless an op says another
	ETag     string // without the mark of a weak one
	Modified string // as the server wrote it
}

// lastModified is the time in the one form that keys have, "" if there is none.
func (a answer) lastModified() string {
	if t := a.time(); t != nil {
		return t.Format(stdhttp.TimeFormat)
	}
	return ""
}

// time is when the file was changed, if the server told.
func (a answer) time() *time.Time {
	t, err := stdhttp.ParseTime(a.Modified)
	if err != nil {
		return nil
	}
	return &t
}

// answer is what a server says that answers with h; its digest is the expected one.
func (s *spec) answer(h stdhttp.Header) answer {
	a := answer{Digest: s.checksum, Offered: s.offered(h), ETag: etag(h), Modified: h.Get("Last-Modified")}
	a.Name = s.name(a.Offered)
	return a
}

// name is the file's: as the op says, or as it is offered.
func (s *spec) name(offered string) string { return cmp.Or(s.file.Name, offered) }

// offered is the name that the server says, or the URL.
func (s *spec) offered(h stdhttp.Header) string {
	_, params, err := mime.ParseMediaType(h.Get("Content-Disposition"))
	if name := params["filename"]; err == nil && name != "" && !strings.HasSuffix(name, "/") {
		return onefile.SafeName(name)
	}
	return onefile.SafeName(path.Base(s.url.Path))
}
