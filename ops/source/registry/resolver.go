package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
)

// Resolver is what one group of sessions may do with registries. It is safe
// for concurrent use and costs nothing to make.
//
// It is a containerd remotes.Resolver whose errors are for users and whose
// transfers count towards the limit of their registry. References are given in
// full (Reference.String).
type Resolver struct {
	c    *Client
	a    Access
	auth *authorizer
	base remotes.Resolver
}

var _ remotes.Resolver = (*Resolver)(nil)

// Resolver returns the view of a's sessions.
func (c *Client) Resolver(a Access) *Resolver {
	r := &Resolver{c: c, a: a, auth: newAuthorizer(c, a)}
	r.base = r.docker()
	return r
}

func (r *Resolver) docker() remotes.Resolver {
	return docker.NewResolver(docker.ResolverOptions{
		Headers: r.c.header,
		Hosts: func(name string) ([]docker.RegistryHost, error) {
			hosts, err := r.c.hosts(name, r.a.Insecure)
			for i := range hosts {
				hosts[i].Authorizer = r.auth
			}
			return hosts, err
		},
	})
}

// Resolve asks what ref stands for. The registry's word is taken for the
// digest of a tag: whoever reads the content checks it. A reference that
// isn't there is an error for which errdefs.IsNotFound holds.
func (r *Resolver) Resolve(ctx context.Context, ref string) (string, ocispec.Descriptor, error) {
	parsed, err := ParseReference(ref)
	if err != nil {
		return "", ocispec.Descriptor{}, err
	}
	release, err := r.c.acquire(ctx, route{host: parsed.Host}, true)
	if err != nil {
		return "", ocispec.Descriptor{}, err
	}
	defer release()
	name, desc, err := r.base.Resolve(quiet(ctx), parsed.String())
	if err != nil {
		return "", ocispec.Descriptor{}, r.explain(ctx, "resolve", ref, err)
	}
	return name, desc, nil
}

// Readers are those whose credentials were shown to registries for what this
// resolver has got; none for what is everybody's. They are worth nothing outside
// of this process.
func (r *Resolver) Readers() []string {
	r.auth.mu.Lock()
	defer r.auth.mu.Unlock()
	return slices.Sorted(maps.Keys(r.auth.shown))
}

// MayRead tells whether the group has the credentials of all those readers of
// something at ref.
func (r *Resolver) MayRead(ctx context.Context, ref Reference, readers []string) (bool, error) {
	if len(readers) == 0 {
		return true, nil
	}
	have, err := r.c.mayShow(ctx, r.a, ref)
	if err != nil {
		return false, fmt.Errorf("%s: %w", ref, err)
	}
	return !slices.ContainsFunc(readers, func(name string) bool { return !slices.Contains(have, name) }), nil
}

// Fetcher returns what fetches blobs and manifests of ref's repository. A
// fetch holds its slot in the registry's limit until it is closed; one that is
// cut off resumes where it was.
func (r *Resolver) Fetcher(ctx context.Context, ref string) (remotes.Fetcher, error) {
	parsed, err := ParseReference(ref)
	if err != nil {
		return nil, err
	}
	f, err := r.base.Fetcher(quiet(ctx), parsed.String())
	if err != nil {
		return nil, describe("fetch from", ref, err)
	}
	return fetcher{r, parsed, f}, nil
}

// Pusher returns what pushes to ref.
func (r *Resolver) Pusher(ctx context.Context, ref string) (remotes.Pusher, error) {
	parsed, err := ParseReference(ref)
	if err != nil {
		return nil, err
	}
	// A resolver of its own, because containerd's takes a blob that was pushed
	// to one repository for pushed to all of them.
	p, err := r.docker().Pusher(quiet(ctx), parsed.String())
	if err != nil {
		return nil, describe("push to", ref, err)
	}
	return pusher{r, parsed, p}, nil
}

func (r *Resolver) explain(ctx context.Context, act, ref string, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return describe(act, ref, err)
}

// acquire takes a slot for one transfer.
func (c *Client) acquire(ctx context.Context, r route, small bool) (release func(), err error) {
	l := c.limit(r)
	if !small {
		if err := l.blobs.Acquire(ctx, 1); err != nil {
			return nil, context.Cause(ctx)
		}
	}
	if err := l.all.Acquire(ctx, 1); err != nil {
		if !small {
			l.blobs.Release(1)
		}
		return nil, context.Cause(ctx)
	}
	return sync.OnceFunc(func() {
		l.all.Release(1)
		if !small {
			l.blobs.Release(1)
		}
	}), nil
}

// small tells whether a blob is a manifest or config, for which one connection
// more may be used, so that they don't wait for layers.
func small(mediaType string) bool {
	return strings.HasSuffix(mediaType, "+json") || images.IsManifestType(mediaType) || images.IsIndexType(mediaType)
}

type fetcher struct {
	r    *Resolver
	ref  Reference
	base remotes.Fetcher
}

// Fetch opens desc.
func (f fetcher) Fetch(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	release, err := f.r.c.acquire(ctx, route{host: f.ref.Host}, small(desc.MediaType))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	rc, err := f.base.Fetch(quiet(ctx), desc)
	if err != nil {
		err = f.explain(ctx, desc, err)
		cancel()
		release()
		return nil, err
	}
	return &body{ctx: ctx, cancel: cancel, f: f, desc: desc, src: rc, release: release}, nil
}

func (f fetcher) explain(ctx context.Context, desc ocispec.Descriptor, err error) error {
	return f.r.explain(ctx, fmt.Sprintf("fetch %s of", desc.Digest), f.ref.Name(), err)
}

// body is a fetch under way. It may be closed while it is read, which
// containerd's reader may not.
type body struct {
	ctx     context.Context // of the one call that made it, until Close
	cancel  context.CancelFunc
	f       fetcher
	desc    ocispec.Descriptor
	release func()

	mu   sync.Mutex // guards the fields below, held while reading
	src  io.ReadCloser
	cuts int
}

// maxCuts bounds how often a fetch is resumed.
const maxCuts = 5

// Read resumes when the connection was reset; containerd's reader, below, does
// so when it merely ended too early.
func (b *body) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	n, err := b.src.Read(p)
	if err == nil || err == io.EOF {
		return n, err
	}
	if seeker, ok := b.src.(io.Seeker); ok && b.ctx.Err() == nil && cut(err) && b.cuts < maxCuts {
		b.cuts++
		if err := reopen(seeker); err == nil {
			return n, nil
		}
	}
	return n, b.f.explain(b.ctx, b.desc, err)
}

// reopen makes the next read start a new request at the present offset: only a
// seek to another offset drops the old one.
func reopen(s io.Seeker) error {
	at, err := s.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	if _, err := s.Seek(at+1, io.SeekStart); err != nil {
		return err
	}
	_, err = s.Seek(at, io.SeekStart)
	return err
}

func cut(err error) bool {
	var ne net.Error
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, net.ErrClosed) || errors.As(err, &ne) && ne.Timeout()
}

// Close ends the fetch, and a Read that is under way, and gives its slot back.
func (b *body) Close() error {
	b.cancel()
	b.mu.Lock()
	defer b.mu.Unlock()
	defer b.release()
	return b.src.Close()
}

type pusher struct {
	r    *Resolver
	ref  Reference
	base remotes.Pusher
}

// Push starts the upload of desc; errdefs.IsAlreadyExists holds for the error
// when the registry has it.
func (p pusher) Push(ctx context.Context, desc ocispec.Descriptor) (content.Writer, error) {
	release, err := p.r.c.acquire(ctx, route{host: p.ref.Host, upload: true}, small(desc.MediaType))
	if err != nil {
		return nil, err
	}
	w, err := p.base.Push(quiet(ctx), desc)
	if err != nil {
		release()
		if errdefs.IsAlreadyExists(err) {
			return nil, err
		}
		return nil, p.explain(ctx, desc, err)
	}
	return &upload{ctx: ctx, p: p, desc: desc, Writer: w, release: release}, nil
}

func (p pusher) explain(ctx context.Context, desc ocispec.Descriptor, err error) error {
	return p.r.explain(ctx, fmt.Sprintf("push %s to", desc.Digest), p.ref.String(), err)
}

// upload is a push under way.
type upload struct {
	ctx  context.Context // of the one call that made it
	p    pusher
	desc ocispec.Descriptor
	content.Writer
	release func()
}

// Commit waits for the registry's word that it has everything.
func (u *upload) Commit(ctx context.Context, size int64, expected digest.Digest, opts ...content.Opt) error {
	err := u.Writer.Commit(ctx, size, expected, opts...)
	if err == nil || errdefs.IsAlreadyExists(err) {
		return err
	}
	return u.p.explain(u.ctx, u.desc, err)
}

// Close ends the upload and gives its slot back.
func (u *upload) Close() error {
	defer u.release()
	return u.Writer.Close()
}

// quiet keeps containerd's resolver from logging: what it would say is in the
// errors, and its log names signed URLs.
func quiet(ctx context.Context) context.Context { return log.WithLogger(ctx, silence) }

var silence = func() *log.Entry {
	l := logrus.New()
	l.SetOutput(io.Discard)
	l.SetLevel(logrus.PanicLevel)
	return logrus.NewEntry(l)
}()
