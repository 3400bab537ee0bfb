package remotecache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/cache/remote"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/solver"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// readBound bounds how long a build waits for the manifest and the config of
	// an import.
	readBound = 30 * time.Second
	// maxDocument bounds their size.
	maxDocument = 32 << 20
	// maxFailures is how many layers that can't be had make an import unreachable.
	// Each costs what a registry is given to answer, so that a build would wait
	// for hours if it asked for all. One that costs minutes is enough.
	maxFailures = 3
)

// Import is a cache that a build asks: the Keys and the Results of a
// solver.Import, and the source of the layers that come of it.
type Import struct {
	cfg    Config
	name   string
	store  store
	client Client
	bound  time.Duration
	gaveUp func(err error) // called once, when nothing is asked of it any more

	once    sync.Once
	ready   chan struct{} // closed once the fields below are set
	index   *remote.Index // nil: nothing is found
	release func()        // of what is offered

	mu     sync.Mutex // guards the fields below
	failed map[digest.Digest]bool
	down   error // why nothing is asked of it any more
}

var (
	_ solver.KeyIndex    = (*Import)(nil)
	_ solver.ResultStore = (*Import)(nil)
	_ cache.BlobSource   = (*Import)(nil)
)

// NewImport returns the cache that attrs name (EXP-072, -074), which Read reads.
// name is what users know it by. gaveUp is called if it turns out to be unreachable
// after it has been read.
func NewImport(cfg Config, name, typ string, attrs map[string]string, c Client, gaveUp func(error)) (*Import, error) {
	im := &Import{cfg: cfg, name: name, client: c, bound: readBound, gaveUp: gaveUp, ready: make(chan struct{}), release: func() {}}
	switch typ {
	case "registry":
		s, err := newInRegistry(cfg, attrs)
		if err != nil {
			return nil, err
		}
		im.store = s
	case "local":
		if attrs["src"] == "" {
			return nil, errors.New("src is missing: src=DIR")
		}
		d, err := digest.Parse(attrs["digest"])
		if err != nil {
			return nil, fmt.Errorf("digest %q of the cache in %s: %w", attrs["digest"], attrs["src"], err)
		}
		im.store = &inDirectory{sessions: cfg.Sessions, dir: attrs["src"], digest: d}
	default:
		return nil, unknown(typ, "import", "registry and local")
	}
	return im, nil
}

// Read gets the keys. It is called once; until it has returned, Lookup waits. An
// import that can't be read has nothing.
func (im *Import) Read(ctx context.Context) error {
	defer im.once.Do(func() { close(im.ready) })
	ctx, cancel := context.WithTimeoutCause(ctx, im.bound, fmt.Errorf("it could not be read within %s", im.bound))
	defer cancel()
	root, err := im.store.root(ctx, im.client)
	if err != nil {
		return err
	}
	index, err := remote.Read(root, func(desc ocispec.Descriptor) ([]byte, error) { return im.read(ctx, desc) })
	if err != nil {
		return err
	}
	im.index = index
	im.release = im.cfg.Cache.Offer(index.Blobs(), im)
	return nil
}

// read returns the verified bytes of a manifest or config.
func (im *Import) read(ctx context.Context, desc ocispec.Descriptor) ([]byte, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("a blob with the digest %.100q: %w", desc.Digest, err)
	}
	if desc.Size > maxDocument {
		return nil, fmt.Errorf("%s has %d bytes, more than the %d that manifests and configs may have", desc.Digest, desc.Size, maxDocument)
	}
	rc, err := im.store.open(ctx, im.client, desc)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	data, err := io.ReadAll(io.LimitReader(rc, maxDocument+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxDocument {
		return nil, fmt.Errorf("%s has more than the %d bytes that manifests and configs may have", desc.Digest, maxDocument)
	}
	if got := desc.Digest.Algorithm().FromBytes(data); got != desc.Digest {
		return nil, fmt.Errorf("asked for %s, got content with the digest %s", desc.Digest, got)
	}
	return data, nil
}

// Close ends the import. Read must have returned.
func (im *Import) Close() { im.release() }

// Lookup implements solver.KeyIndex.
func (im *Import) Lookup(l solver.Lookup) (solver.Found, error) {
	<-im.ready
	if im.index == nil || im.unreachable() != nil {
		return solver.Found{}, nil // whoever called Read was told why
	}
	return im.index.Lookup(l)
}

// Load implements solver.ResultStore. It fetches nothing.
func (im *Import) Load(ctx context.Context, id string) (_ solver.Result, err error) {
	layers, err := im.index.Layers(id)
	if err != nil {
		return nil, fmt.Errorf("record %s of the imported cache %s: %w", id, im.name, err)
	}
	var top *cache.Ref
	for _, l := range layers {
		opts := cache.Options{Description: "imported from " + im.name, CreatedAt: remote.CreatedAt(l.Blob)}
		l.Blob.Annotations = im.store.mark(nil)
		next, err := im.cfg.Cache.GetByBlob(ctx, l, top, im, opts)
		top.Release()
		if err != nil {
			return nil, fmt.Errorf("the imported cache %s: %w", im.name, err)
		}
		top = next
	}
	return ops.Result{Ref: top}, nil
}

// Open implements cache.BlobSource.
func (im *Import) Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	if err := im.unreachable(); err != nil {
		return nil, fmt.Errorf("not asked any more, as others could not be had: %w", err)
	}
	return im.store.open(ctx, im.client, desc)
}

// Failed is told by the cache that a layer couldn't be had. A layer that isn't
// there says nothing of the others.
func (im *Import) Failed(desc ocispec.Descriptor, err error) error {
	named := fmt.Errorf("the imported cache %s: %w", im.name, err)
	if errdefs.IsNotFound(err) {
		return named
	}
	im.mu.Lock()
	if im.failed == nil {
		im.failed = map[digest.Digest]bool{}
	}
	im.failed[desc.Digest] = true
	gaveUp := im.down == nil && (len(im.failed) == maxFailures || silent(err))
	if gaveUp {
		im.down = err
	}
	im.mu.Unlock()
	if gaveUp {
		im.gaveUp(err)
	}
	return named
}

// silent says whether err is that nobody answered, for minutes.
func silent(err error) bool {
	var timeout net.Error
	return errors.Is(err, cache.ErrStalled) || errors.As(err, &timeout) && timeout.Timeout()
}

// unreachable is why nothing is asked of the import any more, nil as long as
// something is.
func (im *Import) unreachable() error {
	im.mu.Lock()
	defer im.mu.Unlock()
	return im.down
}
