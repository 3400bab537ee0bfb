package ops

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/internal/cleanup"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// releaseTimeout bounds how long a step that ended gives back what it held.
const releaseTimeout = time.Minute

// mountSet is what processes find mounted: those of a step, or of a container
// that a frontend starts. Whoever prepares it closes it, however that ended.
type mountSet struct {
	ops      *Loader
	platform ocispec.Platform // of the programs that will run
	group    session.Group
	list     []*pb.Mount // that checkMounts let through
	cwd      string
	inputs   []*cache.Ref // the caller's; nil is empty
	user     string       // who mounts, for people: "exec make all"

	// readable has what the processes write in file systems in memory be seen
	// through sources.
	readable bool

	sources      []mountSource // of each mount in list
	root         []mount.Mount
	readonlyRoot bool
	mounts       []executor.Mount
	emulator     []string // goes before the arguments

	layers  []mountLayer
	caches  map[string]*cacheDir // cache mounts by key: one key is one directory
	private *privateFiles        // secrets and sockets; nil until there are some
	undo    cleanup.Stack
}

// mountLayer is the state behind a mount that is written, or is an output. At
// most one of ref and mutable is set; neither is if it is empty.
type mountLayer struct {
	index   int // of the mount
	ref     *cache.Ref
	mutable *cache.Mutable
}

// mountSource is what a mount shows: the selected path of mounts. There are none
// if something optional isn't there.
type mountSource struct {
	mounts   []mount.Mount
	selector string
}

// prepare acquires everything the processes need. What it acquired before an
// error is close's to give back. What serves the mounts ends with ctx.
func (s *mountSet) prepare(ctx context.Context) error {
	if err := s.emulate(); err != nil {
		return err
	}
	if err := s.acquireCaches(ctx); err != nil {
		return err
	}
	for i, m := range s.list {
		if err := s.prepareMount(ctx, i, m); err != nil {
			return fmt.Errorf("prepare mount %s: %w", m.Dest, err)
		}
	}
	return nil
}

func (s *mountSet) prepareMount(ctx context.Context, i int, m *pb.Mount) error {
	source, selector, err := s.source(ctx, i, m)
	s.sources = append(s.sources, mountSource{source, selector})
	if err != nil || source == nil {
		return err
	}
	if m.Dest == pb.RootMount {
		s.root, s.readonlyRoot = source, m.Readonly
		return nil
	}
	s.mounts = append(s.mounts, executor.Mount{
		Dest:     mountTarget(s.cwd, m.Dest),
		Source:   source,
		Selector: selector,
		Readonly: m.Readonly || m.MountType == pb.MountType_SECRET,
	})
	return nil
}

// source makes what the i-th mount mounts, and says which path in it. No source
// is no mount: something optional isn't there.
func (s *mountSet) source(ctx context.Context, i int, m *pb.Mount) (source []mount.Mount, selector string, err error) {
	switch m.MountType {
	case pb.MountType_BIND:
		source, err = s.bind(ctx, i, m)
		return source, m.Selector, err
	case pb.MountType_CACHE:
		return s.cacheMount(i, m), m.Selector, nil
	case pb.MountType_TMPFS:
		source, err = s.tmpfs(m)
		return source, "", err
	case pb.MountType_SECRET:
		return s.secretFile(ctx, m.SecretOpt)
	case pb.MountType_SSH:
		return s.sshSocket(ctx, m.SSHOpt)
	}
	return nil, "", fmt.Errorf("internal error: mount type %s was checked but can't be made", m.MountType)
}

// bind mounts an input: as it is if it is read-only (LLB-041), else as a layer
// on top of it, which is the output (LLB-041) or thrown away (LLB-042). The
// root is a layer even if the process may not write to it, for the mount
// points that have to be made in it (LLB-043).
func (s *mountSet) bind(ctx context.Context, i int, m *pb.Mount) ([]mount.Mount, error) {
	base := s.input(m)
	if m.Readonly && base != nil && m.Dest != pb.RootMount {
		if hasOutput(m) {
			s.layers = append(s.layers, mountLayer{index: i, ref: base.Clone()})
		}
		mounts, err := base.Mounts(ctx)
		return mounts, lostInput(int(m.Input), err)
	}
	layer, err := s.ops.cfg.Cache.New(ctx, base, cache.Options{
		Description: fmt.Sprintf("mount %s from %s", m.Dest, s.user),
	})
	if err != nil {
		return nil, lostInput(int(m.Input), err)
	}
	s.layers = append(s.layers, mountLayer{index: i, mutable: layer})
	mounts, err := layer.Mounts(ctx, false)
	return mounts, lostInput(int(m.Input), err)
}

// input is the ref that m is based on, nil for none.
func (s *mountSet) input(m *pb.Mount) *cache.Ref {
	if m.Input == int64(pb.Empty) {
		return nil
	}
	return s.inputs[m.Input]
}

func (s *mountSet) tmpfs(m *pb.Mount) ([]mount.Mount, error) {
	own := []mount.Mount{tmpfs(m)}
	if !s.readable {
		return own, nil
	}
	view, err := snapshot.Open(own)
	if err != nil {
		return nil, err
	}
	s.undo.Add(view.Close)
	return []mount.Mount{{Type: "bind", Source: view.Path(), Options: []string{"rbind"}}}, nil
}

func tmpfs(m *pb.Mount) mount.Mount {
	options := []string{"nosuid"}
	if size := m.TmpfsOpt.GetSize(); size > 0 {
		options = append(options, fmt.Sprintf("size=%d", size))
	}
	return mount.Mount{Type: "tmpfs", Source: "tmpfs", Options: options}
}

// close gives back what the set holds.
func (s *mountSet) close(ctx context.Context) error {
	errs := []error{s.undo.Run()}
	for _, l := range s.layers {
		if l.mutable != nil {
			errs = append(errs, release(ctx, l.mutable))
		} else {
			l.ref.Release()
		}
	}
	s.layers = nil
	return errors.Join(errs...)
}

// release gives u back though the step's context may have ended.
func release(ctx context.Context, u *cache.Mutable) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
	defer cancel()
	return u.Release(ctx)
}
