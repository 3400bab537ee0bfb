package registry

import (
	"fmt"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// Reference names an image in a registry, in full: host, repository, and a tag
// or a digest or both.
type Reference struct {
	Host       string // as in references; Docker Hub is "docker.io"
	Repository string // path below the host
	Tag        string
	Digest     digest.Digest
}

// ParseReference reads s as docker does: short names are of Docker Hub, and
// the tag "latest" is meant where there is neither tag nor digest.
func ParseReference(s string) (Reference, error) {
	named, err := reference.ParseNormalizedNamed(s)
	if err != nil {
		return Reference{}, fmt.Errorf("image reference %q: %w", s, err)
	}
	named = reference.TagNameOnly(named)
	r := Reference{Host: reference.Domain(named), Repository: reference.Path(named)}
	if t, ok := named.(reference.Tagged); ok {
		r.Tag = t.Tag()
	}
	if d, ok := named.(reference.Digested); ok {
		r.Digest = d.Digest()
	}
	return r, nil
}

// Name is the reference without tag and digest.
func (r Reference) Name() string { return r.Host + "/" + r.Repository }

// String is the full form.
func (r Reference) String() string {
	s := r.Name()
	if r.Tag != "" {
		s += ":" + r.Tag
	}
	if r.Digest != "" {
		s += "@" + r.Digest.String()
	}
	return s
}
