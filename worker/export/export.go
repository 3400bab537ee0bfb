// Package export turns a build's result into what the client asked for: an
// image in the store or a registry, an OCI or Docker archive, a folder, a tar.
package export

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/ops/source/registry"
	"github.com/moby/buildkit/session"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Config is what exporters work with.
type Config struct {
	Cache    *cache.Manager
	Sessions *session.Manager
	Registry *registry.Client
	Platform ocispec.Platform // of results that don't say theirs
}

// Source is a build's solved result. The refs stay the caller's.
type Source struct {
	Ref      *cache.Ref            // nil is scratch
	Refs     map[string]*cache.Ref // by platform id; nil unless the result is a map
	Metadata map[string][]byte     // EXP-140 to -146
	// Inline returns the build cache that goes into the config of the image that is
	// made of one of the refs, nil for none; it may be nil itself (EXP-051).
	Inline func(ctx context.Context, ref *cache.Ref) ([]byte, error)
}

// Request says for whom an export is made.
type Request struct {
	SessionID string
	Group     session.Group
	Index     int // of the exporter in the request: its id towards the session (SES-051)
}

// Done is what an exporter made.
type Done struct {
	Response   map[string]string   // EXP-059, EXP-147
	Descriptor *ocispec.Descriptor // root descriptor of an image, for the history
	// Finalize does what may only happen once every exporter has succeeded,
	// such as pushing; nil if there is nothing.
	Finalize func(ctx context.Context) error
}

// Exporter makes one output. Its attributes were checked when it was made.
type Exporter interface {
	// Name is shown as the export's vertex, such as "exporting to image".
	Name() string
	// Export makes the output from src. ctx carries the vertex's
	// progress.Scope.
	Export(ctx context.Context, src Source, req Request) (Done, error)
}

// New returns the exporter of the given type (EXP-001 to -005). Unknown types
// and bad attributes are errors that name them.
func New(cfg Config, typ string, attrs map[string]string) (Exporter, error) {
	switch typ {
	case "image", "oci", "docker":
		opts, err := parseImageOptions(typ, attrs)
		if err != nil {
			return nil, err
		}
		if typ == "image" {
			return &imageExporter{cfg: cfg, opts: opts}, nil
		}
		return &archiveExporter{cfg: cfg, opts: opts, docker: typ == "docker"}, nil
	case "local", "tar":
		opts, err := parseFileOptions(typ, attrs)
		if err != nil {
			return nil, err
		}
		return &fileExporter{cfg: cfg, opts: opts, tar: typ == "tar"}, nil
	}
	return nil, fmt.Errorf("no exporter of type %q; there are image, oci, docker, local and tar", typ)
}

// sessionWait bounds how long an exporter waits for its client's session.
const sessionWait = 5 * time.Second

// caller returns the session that takes the output.
func (c Config) caller(ctx context.Context, req Request) (session.Caller, error) {
	if req.SessionID == "" {
		return nil, errors.New("send the result to the client: the request names no session")
	}
	ctx, cancel := context.WithTimeout(ctx, sessionWait)
	defer cancel()
	caller, err := c.Sessions.Get(ctx, req.SessionID, false)
	if err != nil {
		return nil, fmt.Errorf("send the result to the client: %w", err)
	}
	return caller, nil
}
