package cache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// script makes something happen at the n-th call of what is below the manager.
type script struct {
	then func(op string) error

	mu   sync.Mutex // guards the fields below
	left int
	hit  string // the call, once it has happened
}

var errFault = errors.New("injected fault")

func injected(op string) error { return fmt.Errorf("%s: %w", op, errFault) }

func (s *script) call(op string) error {
	s.mu.Lock()
	s.left--
	now := s.left == 0
	if now {
		s.hit = op
	}
	s.mu.Unlock()
	if !now {
		return nil
	}
	return s.then(op)
}

// install puts the script between the manager and what is below it.
func (s *script) install(e *env) {
	e.m.snapshots = scriptedSnapshots{e.snaps, s}
	e.m.blobs = scriptedBlobs{e.blobs, s}
}

type scriptedSnapshots struct {
	snapshot.Snapshotter
	s *script
}

func (f scriptedSnapshots) Prepare(ctx context.Context, id, parent string) error {
	if err := f.s.call("prepare"); err != nil {
		return err
	}
	return f.Snapshotter.Prepare(ctx, id, parent)
}

func (f scriptedSnapshots) Commit(ctx context.Context, id string) error {
	if err := f.s.call("commit"); err != nil {
		return err
	}
	return f.Snapshotter.Commit(ctx, id)
}

func (f scriptedSnapshots) Reopen(ctx context.Context, id string) error {
	if err := f.s.call("reopen"); err != nil {
		return err
	}
	return f.Snapshotter.Reopen(ctx, id)
}

func (f scriptedSnapshots) Stack(ctx context.Context, id string, layers []string) ([]string, error) {
	if err := f.s.call("stack"); err != nil {
		return nil, err
	}
	return f.Snapshotter.Stack(ctx, id, layers)
}

func (f scriptedSnapshots) Mounts(ctx context.Context, id string, readonly bool) ([]mount.Mount, error) {
	if err := f.s.call("mounts"); err != nil {
		return nil, err
	}
	return f.Snapshotter.Mounts(ctx, id, readonly)
}

func (f scriptedSnapshots) Persist(b *store.Batch, id string) error {
	if err := f.s.call("persist"); err != nil {
		return err
	}
	return f.Snapshotter.Persist(b, id)
}

func (f scriptedSnapshots) Usage(ctx context.Context, id string) (snapshot.Usage, error) {
	if err := f.s.call("usage"); err != nil {
		return snapshot.Usage{}, err
	}
	return f.Snapshotter.Usage(ctx, id)
}

func (f scriptedSnapshots) Settle(ctx context.Context) error {
	return f.Snapshotter.(settler).Settle(ctx)
}

func (f scriptedSnapshots) Extra(ctx context.Context) (snapshot.Extra, error) {
	return f.Snapshotter.(measured).Extra(ctx)
}

type scriptedBlobs struct {
	*snapshot.Blobs
	s *script
}

func (f scriptedBlobs) Create() (*snapshot.BlobWriter, error) {
	if err := f.s.call("create blob"); err != nil {
		return nil, err
	}
	return f.Blobs.Create()
}

func (f scriptedBlobs) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	if err := f.s.call("read blob"); err != nil {
		return nil, err
	}
	return f.Blobs.ReaderAt(ctx, desc)
}

func (f scriptedBlobs) Persist(b *store.Batch, dgst digest.Digest) error {
	if err := f.s.call("persist blob"); err != nil {
		return err
	}
	return f.Blobs.Persist(b, dgst)
}

// Whatever call of the snapshotter or the blob store fails, the error comes out
// or is logged, nothing leaks, and all works again.
func TestFaults(t *testing.T) {
	for n := 1; ; n++ {
		e := newEnv(t)
		src := newSource()
		layers := threeLayers(t, src)[:2]
		s := &script{left: n, then: injected}
		s.install(e)
		err := e.scenario(src, layers)
		if s.hit == "" {
			if err != nil {
				t.Fatalf("without a fault: %v", err)
			}
			if n < 25 {
				t.Fatalf("only %d calls were made to fail", n)
			}
			return
		}
		// What can't be stored is cache lost, and a blob that can't be read is
		// fetched or made anew; neither fails a build.
		soft := s.hit == "persist" || s.hit == "persist blob" || s.hit == "read blob"
		if !errors.Is(err, errFault) && !(soft && (err == nil || errors.Is(err, ErrNotFound))) {
			t.Errorf("call %d, %s: error %v", n, s.hit, err)
		}
		e.check()
		if err := e.scenario(src, layers); err != nil {
			t.Errorf("call %d, %s: once more: %v", n, s.hit, err)
		}
		e.check()
		must(t, e.m.Prune(t.Context(), PruneOptions{All: true}, nil))
		e.empty()
		if t.Failed() {
			t.Fatalf("call %d, %s", n, s.hit)
		}
	}
}

// A process may die between any two calls, in the middle of everything: whether
// or not the last group made it to the disk, what is found is whole, and works.
func TestCrashAnywhere(t *testing.T) {
	for _, synced := range []bool{false, true} {
		t.Run(fmt.Sprintf("synced=%t", synced), func(t *testing.T) {
			disk := memory(t, "256m")
			for n := 1; crashAt(t, disk, n, synced); n++ {
				if t.Failed() {
					t.Fatalf("call %d", n)
				}
			}
		})
	}
}

// crashAt runs the scenario and, at the n-th call, takes what a crash would leave.
// It reports whether there was such a call.
func crashAt(t *testing.T, disk string, n int, synced bool) bool {
	t.Helper()
	root, left := filepath.Join(disk, "root"), filepath.Join(disk, "left")
	for _, dir := range []string{root, left} {
		must(t, errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700)))
	}
	// No commit but those that somebody waits for, so that files can be copied.
	e := &env{t: t, root: root, delay: time.Hour}
	e.open()
	defer e.close()
	s := &script{left: n, then: func(op string) error {
		// While records are persisted, nobody may wait for the store.
		if synced && !strings.HasPrefix(op, "persist") {
			must(t, e.db.Sync(context.WithoutCancel(t.Context())))
		}
		out, err := exec.Command("cp", "-a", e.root+"/.", left).CombinedOutput()
		if err != nil {
			t.Errorf("cp: %v: %s", err, out)
		}
		return nil
	}}
	src := newSource()
	layers := threeLayers(t, src)[:2]
	s.install(e)
	must(t, e.scenario(src, layers))
	if s.hit == "" {
		return false
	}
	after := &env{t: t, root: left}
	after.open()
	defer after.close()
	after.check()
	must(t, after.scenario(src, layers))
	after.check()
	must(t, after.m.Prune(t.Context(), PruneOptions{All: true}, nil))
	after.empty()
	if t.Failed() {
		t.Logf("crash at call %d, %s", n, s.hit)
	}
	return true
}

// The disk may be full at any point: what fails says so, and when there is room
// again everything works, without a restart.
func TestDiskFullAnywhere(t *testing.T) {
	disk := memory(t, "16m")
	e := &env{t: t, root: filepath.Join(disk, "state"), delay: time.Millisecond, warn: func(string, ...any) {}}
	must(t, os.Mkdir(e.root, 0o700))
	e.open()
	t.Cleanup(e.close)
	src := newSource()
	layers := threeLayers(t, src)[:2]
	failed := 0
	for free := int64(0); ; free += 4 << 10 {
		filler := filepath.Join(disk, "filler")
		must(t, fill(filler, disk, free))
		err := e.scenario(src, layers)
		if err == nil {
			// Whether what was done can be stored is another matter.
			err = e.db.Sync(t.Context())
		} else if !errors.Is(err, unix.ENOSPC) && !errors.Is(err, ErrNotFound) {
			t.Errorf("with %d bytes free: %v", free, err)
		}
		must(t, os.Remove(filler))
		must(t, e.db.Sync(t.Context()))
		e.check()
		if serr := e.scenario(src, layers); serr != nil {
			t.Errorf("with room again, after %d bytes were free: %v", free, serr)
		}
		must(t, e.m.Prune(t.Context(), PruneOptions{All: true}, nil))
		e.empty()
		if t.Failed() {
			t.Fatalf("with %d bytes free: %v", free, err)
		}
		if err == nil {
			break
		}
		failed++
	}
	if failed < 3 {
		t.Errorf("the disk was full only %d times", failed)
	}
}

// memory mounts a tmpfs, which can be full, and on which a sync costs nothing.
func memory(t *testing.T, size string) (dir string) {
	t.Helper()
	needRoot(t)
	dir = t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size))
	t.Cleanup(func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	return dir
}

// fill writes a file that leaves as much free as given.
func fill(path, disk string, free int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(disk, &st); err != nil {
		return err
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if size := int64(st.Bavail)*st.Bsize - free; size > 0 {
		err = unix.Fallocate(int(f.Fd()), 0, 0, size)
	}
	return errors.Join(err, f.Close())
}

// scenario uses every part of the life of records once.
func (e *env) scenario(src BlobSource, layers []Layer) (err error) {
	ctx := e.t.Context()
	var refs []*Ref
	defer func() {
		for _, r := range refs {
			r.Release()
		}
	}()
	keep := func(r *Ref, err error) (*Ref, error) {
		if err == nil {
			refs = append(refs, r)
		}
		return r, err
	}
	bottom, err := keep(e.m.GetByBlob(ctx, layers[0], nil, src, Options{}))
	if err != nil {
		return err
	}
	top, err := keep(e.m.GetByBlob(ctx, layers[1], bottom, src, Options{}))
	if err != nil {
		return err
	}
	u, err := e.m.New(ctx, top, Options{Retain: true, Index: map[string]string{"k": "v"}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, u.Release(ctx)) }()
	if _, err := u.Mounts(ctx, false); err != nil {
		return err
	}
	r, err := u.Commit(ctx)
	if err != nil {
		return err
	}
	id := r.ID()
	r.Release()
	again, err := e.m.GetMutable(ctx, id)
	if err != nil {
		return err // ErrNotFound if it could not be stored
	}
	defer again.Release(ctx)
	if _, err = keep(again.Commit(ctx)); err != nil {
		return err
	}
	other, err := e.m.New(ctx, nil, Options{})
	if err != nil {
		return err
	}
	defer other.Release(ctx)
	side, err := keep(other.Commit(ctx))
	if err != nil {
		return err
	}
	m, err := keep(e.m.Merge(ctx, []*Ref{refs[2], side}, Options{}))
	if err != nil {
		return err
	}
	if _, err := m.Mounts(ctx); err != nil {
		return err
	}
	b := &store.Batch{}
	if err := m.Persist(b); err != nil {
		return err
	}
	e.db.Write(b)
	if _, err := m.Layers(ctx, Compression{Type: "zstd", Force: true}); err != nil {
		return err
	}
	_, err = e.m.DiskUsage(ctx, nil, 0)
	return err
}
