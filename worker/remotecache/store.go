package remotecache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/kilnbuild/kiln/ops/source/ocilayout"
	"github.com/kilnbuild/kiln/ops/source/registry"
	"github.com/moby/buildkit/session"
	sessioncontent "github.com/moby/buildkit/session/content"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
)

// opener gives the bytes of a blob, each time that it is called.
type opener func(context.Context) (io.ReadCloser, error)

// store is a place where a cache is kept.
type store interface {
	// root says what the cache is found by.
	root(ctx context.Context, c Client) (ocispec.Descriptor, error)
	// open gives a blob or manifest. Its bytes aren't verified.
	open(ctx context.Context, c Client, desc ocispec.Descriptor) (io.ReadCloser, error)
	// put stores a blob, unless it is there.
	put(ctx context.Context, c Client, desc ocispec.Descriptor, open opener) error
	// putRoot stores the manifest that the cache is found by.
	putRoot(ctx context.Context, c Client, desc ocispec.Descriptor, open opener) error
	// mark notes in the annotations of a layer that it is there.
	mark(annotations map[string]string) map[string]string
}

// inRegistry keeps a cache under a reference.
type inRegistry struct {
	client   *registry.Client
	sessions *session.Manager
	ref      registry.Reference
	insecure bool
}

func newInRegistry(cfg Config, attrs map[string]string) (*inRegistry, error) {
	s := &inRegistry{client: cfg.Registry, sessions: cfg.Sessions}
	if attrs["ref"] == "" {
		return nil, errors.New("ref is missing: ref=HOST/NAME:TAG")
	}
	var err error
	if s.ref, err = registry.ParseReference(attrs["ref"]); err != nil {
		return nil, err
	}
	return s, flags(attrs, map[string]*bool{"registry.insecure": &s.insecure})
}

func (s *inRegistry) resolver(c Client) *registry.Resolver {
	return s.client.Resolver(registry.Access{Sessions: s.sessions, Group: c.group(), Insecure: s.insecure})
}

func (s *inRegistry) root(ctx context.Context, c Client) (ocispec.Descriptor, error) {
	_, desc, err := s.resolver(c).Resolve(ctx, s.ref.String())
	return desc, err
}

func (s *inRegistry) open(ctx context.Context, c Client, desc ocispec.Descriptor) (io.ReadCloser, error) {
	f, err := s.resolver(c).Fetcher(ctx, s.ref.String())
	if err != nil {
		return nil, err
	}
	return f.Fetch(ctx, desc)
}

func (s *inRegistry) put(ctx context.Context, c Client, desc ocispec.Descriptor, open opener) error {
	_, err := s.resolver(c).Push(ctx, s.ref.Name()+"@"+desc.Digest.String(), desc, open)
	return err
}

func (s *inRegistry) putRoot(ctx context.Context, c Client, desc ocispec.Descriptor, open opener) error {
	_, err := s.resolver(c).Push(ctx, s.ref.String(), desc, open)
	return err
}

func (s *inRegistry) mark(annotations map[string]string) map[string]string {
	return registry.SourceAnnotations(annotations, s.ref)
}

// inDirectory keeps a cache in a directory of the client, who names it by digest
// in an index of its own.
type inDirectory struct {
	sessions *session.Manager
	dir      string
	digest   digest.Digest // to read
}

// sessionWait bounds the wait for a client that is named but not there yet.
const sessionWait = 5 * time.Second

// with calls fn for the client that has the directory.
func (s *inDirectory) with(ctx context.Context, c Client, fn func(context.Context, session.Caller) error) error {
	if c.SessionID == "" {
		return fmt.Errorf("the client's directory %s: the request names no session", s.dir)
	}
	wait, cancel := context.WithTimeout(ctx, sessionWait)
	caller, err := s.sessions.Get(wait, c.SessionID, false)
	cancel()
	if err == nil {
		err = fn(caller.Context(ctx), caller)
	}
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	return fmt.Errorf("the client's directory %s: %w", s.dir, err)
}

func (s *inDirectory) store() string { return "local:" + s.dir }

func (s *inDirectory) root(context.Context, Client) (ocispec.Descriptor, error) {
	return ocispec.Descriptor{Digest: s.digest}, nil
}

func (s *inDirectory) open(ctx context.Context, c Client, desc ocispec.Descriptor) (rc io.ReadCloser, err error) {
	err = s.with(ctx, c, func(ctx context.Context, caller session.Caller) (err error) {
		rc, err = ocilayout.OpenBlob(ctx, caller, s.store(), desc.Digest)
		return err
	})
	return rc, err
}

func (s *inDirectory) put(ctx context.Context, c Client, desc ocispec.Descriptor, open opener) error {
	return s.with(ctx, c, func(ctx context.Context, caller session.Caller) error {
		err := write(ctx, sessioncontent.NewCallerStore(caller, s.store()), desc, open)
		if errdefs.IsAlreadyExists(err) || grpcerrors.Code(err) == codes.AlreadyExists {
			return nil
		}
		return err
	})
}

func (s *inDirectory) putRoot(ctx context.Context, c Client, desc ocispec.Descriptor, open opener) error {
	return s.put(ctx, c, desc, open)
}

func (s *inDirectory) mark(annotations map[string]string) map[string]string { return annotations }

func write(ctx context.Context, to content.Store, desc ocispec.Descriptor, open opener) (err error) {
	if _, err := to.Info(ctx, desc.Digest); err == nil {
		return nil
	}
	w, err := content.OpenWriter(ctx, to, content.WithRef("kiln-"+desc.Digest.String()), content.WithDescriptor(desc))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	rc, err := open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rc.Close()) }()
	return content.Copy(ctx, w, rc, desc.Size, desc.Digest)
}
