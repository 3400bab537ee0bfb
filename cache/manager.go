package cache

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// blobStore is what the manager needs of *snapshot.Blobs.
type blobStore interface {
	Create() (*snapshot.BlobWriter, error)
	Stat(dgst digest.Digest) (snapshot.BlobInfo, error)
	ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error)
	Persist(b *store.Batch, dgst digest.Digest) error
	Remove(b *store.Batch, dgst digest.Digest) error
	Walk(fn func(snapshot.BlobInfo) error) error
	Sweep(ctx context.Context) (int, error)
	Settle(ctx context.Context) error
}

// Manager owns all records. All methods are safe for concurrent use.
type Manager struct {
	db        *store.DB
	snapshots snapshot.Snapshotter
	blobs     blobStore
	log       *slog.Logger
	root      string
	rules     []PruneOptions
	grown     func()
	free      func(ctx context.Context) (free int64, err error)
	breathe   func() // lets go of mu for a moment

	extracting flights[*record]
	fetching   flights[digest.Digest]
	making     flights[blobKey]
	surveying  sync.Mutex    // guards record.place
	pruning    chan struct{} // holds a token while a Prune runs
	stall      time.Duration // stallBound; tests have less patience

	evictions, evictedBytes atomic.Int64 // since the start

	writes  sync.Mutex   // see the package comment
	journal journal      // guarded by writes
	blobsMu sync.RWMutex // see the package comment

	mu          sync.Mutex // guards the fields below and all records; never held across I/O
	records     map[string]*record
	order       order                     // of records
	byChain     map[digest.Digest]*record // has that chain ID and a snapshot
	byBlobChain map[digest.Digest]*record
	byIndex     map[indexKey]map[*record]struct{}
	blobUse     map[digest.Digest]int   // records that point at a blob
	proven      map[digest.Digest]proof // stored blobs whose bytes were right
	offers      map[digest.Digest][]BlobSource
	dirty       map[*record]struct{} // persisted records that changed
	used        map[*record]struct{} // persisted records whose last use or size isn't written
	hooks       []removeHook
	dropped     []string           // ids of persisted records that Open found unusable
	adopted     map[string]*record // by snapshot: those of Config.Adopt that nobody has taken yet
	life        string             // see newLife
	lastSnap    uint64
	closed      bool
}

type indexKey struct{ key, value string }

func newManager(cfg Config) *Manager {
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	m := &Manager{
		db:          cfg.Store,
		snapshots:   cfg.Snapshots,
		blobs:       cfg.Blobs,
		log:         log,
		root:        cfg.Root,
		rules:       cfg.Rules,
		grown:       cfg.Grown,
		pruning:     make(chan struct{}, 1),
		stall:       stallBound,
		records:     map[string]*record{},
		byChain:     map[digest.Digest]*record{},
		byBlobChain: map[digest.Digest]*record{},
		byIndex:     map[indexKey]map[*record]struct{}{},
		blobUse:     map[digest.Digest]int{},
		proven:      map[digest.Digest]proof{},
		offers:      map[digest.Digest][]BlobSource{},
		dirty:       map[*record]struct{}{},
		used:        map[*record]struct{}{},
		adopted:     map[string]*record{},
	}
	m.free = m.freeSpace
	m.breathe = func() {
		m.mu.Unlock()
		m.mu.Lock()
	}
	if m.grown == nil {
		m.grown = func() {}
	}
	return m
}

// Close writes what is only in memory. Handles that are still held are an
// error that names their records; they must not be used any more.
func (m *Manager) Close() error {
	var held []string
	m.eachRecord(func(r *record) {
		if r.handles > 0 {
			held = append(held, fmt.Sprintf("%s (%s)", r.id, r.opts.Description))
		}
	})
	m.flush(flushClose)
	m.mu.Lock()
	m.closed = true
	m.mu.Unlock()
	if len(held) > 0 {
		slices.Sort(held)
		return fmt.Errorf("internal error: close cache with %d records in use: %q", len(held), held)
	}
	return nil
}

// removeHook is told of persisted records inside the batch b that removes them,
// so that what points at them goes with them. It returns, by id, the cache keys
// that led to them, in binary; the journal keeps those.
type removeHook func(b *store.Batch, ids []string) (keys map[string][]string)

// OnRemove registers fn. For what Open dropped it is called at once. It must not
// call the manager, and no lock that it takes may be held around a call of the
// manager other than Persist.
func (m *Manager) OnRemove(fn func(b *store.Batch, ids []string) (keys map[string][]string)) {
	m.mu.Lock()
	m.hooks = append(m.hooks, fn)
	dropped := m.dropped
	m.mu.Unlock()
	if len(dropped) > 0 {
		b := &store.Batch{}
		fn(b, dropped)
		m.db.Write(b)
	}
}

func (m *Manager) callHooks(b *store.Batch, ids []string) (keys map[string][]string) {
	m.mu.Lock()
	hooks := slices.Clone(m.hooks)
	m.mu.Unlock()
	for _, fn := range hooks {
		for id, more := range fn(b, ids) {
			if keys == nil {
				keys = map[string][]string{}
			}
			keys[id] = append(keys[id], more...)
		}
	}
	return keys
}

// New starts a mutable record on top of parent, which may be nil for an empty
// one. The caller keeps its handle on parent. A lazy parent is extracted.
func (m *Manager) New(ctx context.Context, parent *Ref, opts Options) (*Mutable, error) {
	var parents []*record
	var parentSnap string
	if parent != nil {
		if err := parent.Extract(ctx); err != nil {
			return nil, err
		}
		parents = []*record{parent.r}
		parentSnap = m.snapOf(parent.r)
	}
	r := newRecord(mutable, parents, opts)
	r.snap = m.nextSnap()
	if err := m.prepare(ctx, r.snap, parentSnap); err != nil {
		err = fmt.Errorf("prepare snapshot for %q: %w", opts.Description, err)
		if parent != nil {
			err = m.lostSnapshot(ctx, parent.r, err)
		}
		return nil, err
	}
	m.mu.Lock()
	m.addLocked(r)
	m.mu.Unlock()
	m.flush(flushChanged)
	return &Mutable{m: m, r: r}, nil
}

// prepare starts the snapshot snap on top of parent.
func (m *Manager) prepare(ctx context.Context, snap, parent string) error {
	if parent != "" {
		grown, err := m.snapshots.Ground(ctx, parent)
		m.grew(grown)
		if err != nil {
			return err
		}
	}
	return m.snapshots.Prepare(ctx, snap, parent)
}

// Get returns a handle on an immutable record: ErrNotFound if there is none.
func (m *Manager) Get(ctx context.Context, id string) (*Ref, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.records[id]
	switch {
	case r == nil:
		return nil, fmt.Errorf("%w: %s", ErrNotFound, id)
	case r.lost != nil:
		return nil, fmt.Errorf("%w: %s was lost: %v", ErrNotFound, id, r.lost)
	case r.state != immutable:
		return nil, fmt.Errorf("%w: %s is %s", ErrNotFound, id, r.state)
	}
	r.handles++
	return m.newRef(r), nil
}

// Exists says whether Get would find the record.
func (m *Manager) Exists(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.records[id]
	return r != nil && r.lost == nil && r.state == immutable
}

// Search returns the ids of records whose index has value under key, newest
// first.
func (m *Manager) Search(key, value string) []string {
	m.mu.Lock()
	found := slices.Collect(maps.Keys(m.byIndex[indexKey{key, value}]))
	slices.SortFunc(found, func(a, b *record) int {
		return cmp.Or(b.opts.CreatedAt.Compare(a.opts.CreatedAt), b.lastUsed.Compare(a.lastUsed), cmp.Compare(a.id, b.id))
	})
	ids := make([]string, len(found))
	for i, r := range found {
		ids[i] = r.id
	}
	m.mu.Unlock()
	return ids
}

// lifeLen is the length of Manager.life.
const lifeLen = 4

// nextSnap names a new snapshot. The names are short, because a mount names
// every layer.
func (m *Manager) nextSnap() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lastSnap++
	return m.life + strconv.FormatUint(m.lastSnap, 36)
}

func (m *Manager) snapOf(r *record) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return r.snap
}

// missing reports whether a snapshot's files are gone.
func (m *Manager) missing(ctx context.Context, snap string) bool {
	_, err := m.snapshots.Usage(ctx, snap)
	return isGone(err)
}

// isGone tells errors that say that files aren't there.
func isGone(err error) bool {
	return errors.Is(err, snapshot.ErrNotFound) || errors.Is(err, fs.ErrNotExist)
}

// checkMounts returns an error if a directory that mounts name is gone. Who
// mounts them could not tell that from other failures.
func checkMounts(mounts []mount.Mount) error {
	for _, mnt := range mounts {
		dirs := []string{mnt.Source}
		if mnt.Type == "overlay" {
			dirs = nil
			for _, o := range mnt.Options {
				if list, ok := strings.CutPrefix(o, "lowerdir="); ok {
					dirs = append(dirs, strings.Split(list, ":")...)
				} else if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
					dirs = append(dirs, dir)
				}
			}
		}
		for _, dir := range dirs {
			if !filepath.IsAbs(dir) {
				continue // relative to what only the snapshotter knows
			}
			if _, err := os.Lstat(dir); err != nil {
				return fmt.Errorf("layer directory: %w", err)
			}
		}
	}
	return nil
}

// lostSnapshot turns an error that says that files of r are gone into ErrLost
// and takes r out of use; other errors stay what they are.
func (m *Manager) lostSnapshot(ctx context.Context, r *record, err error) error {
	if changed := (*snapshot.ChangedError)(nil); errors.As(err, &changed) {
		err = fmt.Errorf("%w: %s: %w", ErrLost, r.id, err)
		m.distrustSnapshot(changed.ID, err)
		return err
	}
	if !isGone(err) {
		return err
	}
	err = fmt.Errorf("%w: %s: %w", ErrLost, r.id, err)
	m.quarantine(context.WithoutCancel(ctx), r, err)
	return err
}

// indexLocked makes r findable by its index and chains.
func (m *Manager) indexLocked(r *record) {
	for k, v := range r.opts.Index {
		key := indexKey{k, v}
		if m.byIndex[key] == nil {
			m.byIndex[key] = map[*record]struct{}{}
		}
		m.byIndex[key][r] = struct{}{}
	}
	m.indexChainLocked(r)
}

// indexChainLocked recomputes the chain IDs of r from those of its layers and
// makes it findable by them.
func (m *Manager) indexChainLocked(r *record) {
	if r.state != immutable || r.broken {
		return
	}
	if r.chain == "" || r.blobChain == "" {
		r.chain, r.blobChain = chains(r)
	}
	if r.layers != nil {
		return // its snapshot is all of its layers at once, which a layer's must not be
	}
	if r.chain != "" && r.snap != "" && m.byChain[r.chain] == nil {
		m.byChain[r.chain] = r
	}
	if r.blobChain != "" && m.byBlobChain[r.blobChain] == nil {
		m.byBlobChain[r.blobChain] = r
	}
}

func (m *Manager) unindexLocked(r *record) {
	for k, v := range r.opts.Index {
		key := indexKey{k, v}
		delete(m.byIndex[key], r)
		if len(m.byIndex[key]) == 0 {
			delete(m.byIndex, key)
		}
	}
	m.unindexChainLocked(r)
}

func (m *Manager) unindexChainLocked(r *record) {
	if m.byChain[r.chain] == r {
		delete(m.byChain, r.chain)
	}
	if m.byBlobChain[r.blobChain] == r {
		delete(m.byBlobChain, r.blobChain)
	}
}

// chains computes the chain ID and blob chain ID of r, "" where something in
// the chain is unknown.
func chains(r *record) (chain, blobChain digest.Digest) {
	if r.layers != nil {
		for i, l := range r.layers {
			if l.diffID == "" {
				return "", ""
			}
			chain = link(chain, l.diffID)
			if i == 0 || blobChain != "" {
				blobChain = linkBlob(blobChain, l)
			}
		}
		return chain, blobChain
	}
	p := r.parent()
	switch {
	case p == nil:
		return r.diffID, linkBlob("", r)
	case p.chain == "":
		return "", ""
	case p.blobChain == "":
		return link(p.chain, r.diffID), ""
	}
	return link(p.chain, r.diffID), linkBlob(p.blobChain, r)
}

// refreshChainLocked fills in the chain IDs of r and of those below it that
// have become known.
func (m *Manager) refreshChainLocked(r *record) {
	if r == nil || r.chain != "" && r.blobChain != "" {
		return
	}
	var line []*record // r first
	for p := r; p != nil && (p.chain == "" || p.blobChain == ""); p = p.parent() {
		line = append(line, p)
	}
	for _, p := range slices.Backward(line) {
		m.indexChainLocked(p)
	}
}

// link is one step of the chain ID as the OCI image specification defines it.
func link(below, diffID digest.Digest) digest.Digest {
	if below == "" || diffID == "" {
		return diffID
	}
	return digest.FromString(below.String() + " " + diffID.String())
}

func linkBlob(below digest.Digest, r *record) digest.Digest {
	if len(r.blobs) == 0 || r.diffID == "" {
		return ""
	}
	own := digest.FromString(r.blobs[0].desc.Digest.String() + " " + r.diffID.String())
	return link(below, own)
}

// joinProblems joins errors under the act that met them; nil for none.
func joinProblems(act string, problems []error) error {
	if err := errors.Join(problems...); err != nil {
		return fmt.Errorf("%s: %w", act, err)
	}
	return nil
}
