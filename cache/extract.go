package cache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"syscall"

	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/snapshot"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// parallelFetches bounds the layers that one Extract fetches side by side.
const parallelFetches = 4

// Extract makes the record and its parents mountable: lazy layers are fetched
// side by side, verified, and unpacked in their order: as they arrive, where
// the layer below is ready by then. Progress goes to the context's scope.
// ErrLost if a layer can't be had.
//
// Askers for the same record share the work. It ends early only when all of
// them have left.
func (r *Ref) Extract(ctx context.Context) error {
	if r == nil {
		return nil
	}
	if err := r.m.checkChanged(r.r); err != nil || r.m.snapOf(r.r) != "" {
		return err
	}
	return r.m.WithRoom(ctx, func() error { return r.extract(ctx) })
}

func (r *Ref) extract(ctx context.Context) error {
	fetches := &slots{free: parallelFetches}
	g, gctx := errgroup.WithContext(ctx)
	for _, l := range r.m.lazy(r.r) {
		g.Go(func() error { return r.m.extract(gctx, l, fetches) })
	}
	return g.Wait()
}

// lazy returns the records without snapshot that r needs, lowest first.
func (m *Manager) lazy(r *record) []*record {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []*record
	seen := map[*record]bool{}
	var visit func(r *record)
	visit = func(r *record) {
		if r == nil || seen[r] || r.snap != "" {
			return
		}
		seen[r] = true
		for _, l := range r.layers {
			visit(l)
		}
		visit(r.parent())
		out = append(out, r)
	}
	visit(r)
	return out
}

// extract gives r a snapshot.
func (m *Manager) extract(ctx context.Context, r *record, fetches *slots) error {
	return m.extracting.do(ctx, r, func(ctx context.Context) error {
		switch {
		case m.share(r):
			return nil
		case r.layers != nil:
			return m.extractStack(ctx, r, fetches)
		}
		return m.extractLayer(ctx, r, fetches)
	})
}

// share reports whether r has a snapshot, its own or one of the same chain.
func (m *Manager) share(r *record) bool {
	m.mu.Lock()
	shared := r.snap == "" && m.shareLocked(r)
	if shared {
		r.twin.children++
		m.changedLocked(r)
	}
	has := r.snap != ""
	m.mu.Unlock()
	if shared {
		m.flush(flushChanged)
	}
	return has
}

func (m *Manager) extractStack(ctx context.Context, r *record, fetches *slots) error {
	g, gctx := errgroup.WithContext(quiet(ctx))
	for _, l := range r.layers {
		g.Go(func() error { return m.extract(gctx, l, fetches) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	snaps := make([]string, len(r.layers))
	for i, l := range r.layers {
		snaps[i] = m.snapOf(l)
	}
	snap := m.nextSnap()
	grown, err := m.snapshots.Stack(ctx, snap, snaps)
	m.grew(grown)
	if err != nil {
		return m.lostSnapshot(ctx, r, fmt.Errorf("stack %d layers as %s: %w", len(snaps), r.id, err))
	}
	m.extracted(r, snap)
	return nil
}

// grew forgets the sizes of the snapshots.
func (m *Manager) grew(snaps []string) {
	if len(snaps) == 0 {
		return
	}
	grown := make(map[string]bool, len(snaps))
	for _, snap := range snaps {
		grown[snap] = true
	}
	m.eachRecord(func(r *record) {
		if r.owns() && grown[r.snap] {
			r.snapSize = sizeUnknown
			m.changedLocked(r)
		}
	})
	m.flush(flushChanged)
}

// extractLayer fetches and unpacks the layer r.
func (m *Manager) extractLayer(ctx context.Context, r *record, fetches *slots) error {
	below := m.extractBelow(ctx, r, fetches)
	defer below.stop()
	desc, stored := m.bestBlob(r)
	if desc.Digest == "" {
		return m.lose(r, fmt.Errorf("%w: %s has neither files nor a blob", ErrLost, r.id))
	}
	if !stored {
		u, err := m.fetchLayer(ctx, r, desc, below, fetches)
		if err != nil {
			return err
		}
		if u.snap != "" {
			return m.commitLayer(ctx, r, u)
		}
	}
	if err := below.wait(ctx); err != nil {
		return err
	}
	u, err := m.unpackStored(ctx, r, desc, below.snap())
	if stored && errors.Is(err, errContent) && !localTrouble(err) {
		// It was there, and good when it was stored; the source may still have it.
		m.dropBlob(desc.Digest, err)
		if ferr := m.ensureBlob(ctx, r, desc, nil); ferr != nil {
			return fmt.Errorf("%w; stored copy: %w", ferr, err)
		}
		u, err = m.unpackStored(ctx, r, desc, below.snap())
	}
	if err != nil {
		return m.lostContent(r, desc, err)
	}
	return m.commitLayer(ctx, r, u)
}

// unpacked is the active snapshot of a layer.
type unpacked struct {
	snap string // "" for none
	done func() // tells progress
}

// bestBlob returns a form of r that is stored, if there is one, and the first
// otherwise.
func (m *Manager) bestBlob(r *record) (desc ocispec.Descriptor, stored bool) {
	m.mu.Lock()
	blobs := slices.Clone(r.blobs)
	m.mu.Unlock()
	for _, b := range blobs {
		if m.stored(r, b.desc.Digest) {
			return b.desc, true
		}
	}
	if len(blobs) == 0 {
		return desc, false
	}
	return blobs[0].desc, false
}

// fetchLayer gets the blob of r into the store. If the layer below is ready
// when the transfer starts, the layer is unpacked as it arrives.
func (m *Manager) fetchLayer(ctx context.Context, r *record, desc ocispec.Descriptor, below *parentWait, fetches *slots) (u unpacked, err error) {
	release, err := fetches.acquire(ctx, r.depth)
	if err != nil {
		return u, err
	}
	defer release()
	if !below.ready() {
		return u, m.ensureBlob(ctx, r, desc, nil)
	}
	a := &arrival{m: m, r: r, desc: desc, parent: below.snap()}
	if err := m.ensureBlob(ctx, r, desc, a.unpack); err != nil {
		m.removeSnapshot(a.take().snap)
		return u, err
	}
	return a.take(), nil
}

// arrival unpacks a layer while its blob is fetched. The fetch may outlive the
// extraction, when somebody else waits for the blob only.
type arrival struct {
	m      *Manager
	r      *record
	desc   ocispec.Descriptor
	parent string

	mu    sync.Mutex // guards the fields below
	got   unpacked
	taken bool // what comes now is nobody's
}

func (a *arrival) unpack(ctx context.Context, body io.Reader) error {
	a.m.mu.Lock()
	a.r.handles++ // keeps the parent's snapshot
	a.m.mu.Unlock()
	u, err := a.m.unpack(ctx, a.r, a.desc, a.parent, body)
	a.mu.Lock()
	unwanted := a.got.snap // of another source, whose blob was wrong after all
	if a.got = u; a.taken {
		unwanted, a.got = u.snap, unpacked{}
	}
	a.mu.Unlock()
	a.m.removeSnapshot(unwanted)
	return errors.Join(err, a.m.release(a.r))
}

func (a *arrival) take() unpacked {
	a.mu.Lock()
	defer a.mu.Unlock()
	u := a.got
	a.got, a.taken = unpacked{}, true
	return u
}

// parentWait is the extraction of a layer's parent, going on beside its own.
type parentWait struct {
	m      *Manager
	r      *record // nil for none
	cancel context.CancelFunc
	done   chan struct{}
	err    error // set before done is closed
}

func (m *Manager) extractBelow(ctx context.Context, r *record, fetches *slots) *parentWait {
	ctx, cancel := context.WithCancel(quiet(ctx))
	w := &parentWait{m: m, r: r.parent(), cancel: cancel, done: make(chan struct{})}
	if w.r == nil || m.snapOf(w.r) != "" {
		close(w.done)
		return w
	}
	go func() {
		defer close(w.done)
		w.err = m.extract(ctx, w.r, fetches)
	}()
	return w
}

// stop ends the wait, and the extraction if nobody else wants it.
func (w *parentWait) stop() {
	w.cancel()
	<-w.done
}

func (w *parentWait) ready() bool {
	select {
	case <-w.done:
		return w.err == nil
	default:
		return false
	}
}

func (w *parentWait) wait(ctx context.Context) error {
	select {
	case <-w.done:
		return w.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (w *parentWait) snap() string {
	if w.r == nil {
		return ""
	}
	return w.m.snapOf(w.r)
}

// quiet keeps the progress of what others report already out of ctx's scope.
func quiet(ctx context.Context) context.Context {
	return progress.With(ctx, progress.NewScope(progress.Discard, ""))
}

func (m *Manager) unpackStored(ctx context.Context, r *record, desc ocispec.Descriptor, parent string) (unpacked, error) {
	ra, err := m.blobs.ReaderAt(ctx, desc)
	if errors.Is(err, snapshot.ErrNotFound) { // somebody has just deleted it
		err = fmt.Errorf("%w: %w", errContent, err)
	}
	if err != nil {
		return unpacked{}, fmt.Errorf("open blob %s: %w", desc.Digest, err)
	}
	defer ra.Close()
	return m.unpack(ctx, r, desc, parent, io.NewSectionReader(ra, 0, ra.Size()))
}

// errContent marks errors about the bytes of a layer, not about the disk.
var errContent = errors.New("bad layer content")

// unpack makes the active snapshot of r out of its compressed layer, and
// checks the diff ID. On failure nothing is left.
func (m *Manager) unpack(ctx context.Context, r *record, desc ocispec.Descriptor, parent string, body io.Reader) (u unpacked, err error) {
	done := progress.From(ctx).Begin("extracting " + desc.Digest.String())
	snap := m.nextSnap()
	if err := m.prepare(ctx, snap, parent); err != nil {
		err = fmt.Errorf("prepare snapshot for layer %s: %w", desc.Digest, err)
		if p := r.parent(); p != nil {
			err = m.lostSnapshot(ctx, p, err)
		}
		return u, err
	}
	defer func() {
		if err != nil {
			m.removeSnapshot(snap)
		}
	}()
	tar, err := decompress(body)
	if err != nil {
		return u, fmt.Errorf("%w: decompress layer %s: %w", errContent, desc.Digest, err)
	}
	defer tar.Close()
	verifier := r.diffID.Verifier()
	checked := io.TeeReader(tar, verifier)
	if err := snapshot.Apply(ctx, m.snapshots, snap, checked); err != nil {
		err = fmt.Errorf("unpack layer %s: %w", desc.Digest, err)
		if !localTrouble(err) {
			err = fmt.Errorf("%w: %w", errContent, err)
		}
		return u, err
	}
	// A tar reader stops at the end marker; the diff ID covers what follows.
	if _, err := io.Copy(io.Discard, checked); err != nil {
		return u, fmt.Errorf("%w: decompress layer %s: %w", errContent, desc.Digest, err)
	}
	if !verifier.Verified() {
		return u, fmt.Errorf("%w: layer %s unpacks to something else than its diff ID %s", errContent, desc.Digest, r.diffID)
	}
	return unpacked{snap, done}, nil
}

func (m *Manager) commitLayer(ctx context.Context, r *record, u unpacked) error {
	if err := m.snapshots.Commit(ctx, u.snap); err != nil {
		m.removeSnapshot(u.snap)
		return fmt.Errorf("commit layer %s: %w", r.id, err)
	}
	m.extracted(r, u.snap)
	u.done()
	return nil
}

// extracted gives r its snapshot.
func (m *Manager) extracted(r *record, snap string) {
	m.mu.Lock()
	r.snap = snap
	r.lost = nil
	m.indexChainLocked(r)
	m.changedLocked(r)
	m.mu.Unlock()
	m.flush(flushChanged)
}

// removeSnapshot removes a snapshot that never became a record's.
func (m *Manager) removeSnapshot(snap string) {
	if snap == "" {
		return
	}
	b := &store.Batch{}
	if err := m.snapshots.Remove(b, snap); err != nil {
		m.log.Error("remove unfinished snapshot", "snapshot", snap, "error", err)
	}
	m.db.Write(b)
}

// lostContent decides whether an error about a layer means that the layer is
// lost, or is about this machine.
func (m *Manager) lostContent(r *record, desc ocispec.Descriptor, err error) error {
	if errors.Is(err, ErrLost) || !errors.Is(err, errContent) || localTrouble(err) {
		return err
	}
	return m.lose(r, fmt.Errorf("%w: layer %s: %w", ErrLost, desc.Digest, err))
}

// lose marks r as lost until GetByBlob brings a new source for it.
func (m *Manager) lose(r *record, err error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r.lost == nil {
		m.log.Warn("cache record can't be fetched", "record", r.id, "description", r.opts.Description, "error", err)
	}
	r.lost = err
	return err
}

// localTrouble reports errors that no other copy of the bytes would avoid.
func localTrouble(err error) bool {
	for _, no := range []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT, syscall.EROFS,
		syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.EPERM, syscall.EACCES} {
		if errors.Is(err, no) {
			return true
		}
	}
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}
