package ops

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/internal/cleanup"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
)

// releaseTimeout bounds how long a step that ended gives back what it held.
const releaseTimeout = time.Minute

// step is one run of an exec op: what it acquired and what comes of it.
type step struct {
	*execOp
	group  session.Group
	inputs []*cache.Ref // the caller's; nil is empty

	root         []mount.Mount
	readonlyRoot bool
	mounts       []executor.Mount
	emulator     []string // goes before the arguments

	outputs []stepOutput
	caches  map[string]*cacheDir // cache mounts by key: one key is one directory
	private *privateFiles        // secrets and sockets; nil until there are some
	undo    cleanup.Stack
}

// stepOutput is a mount that becomes a result. One of the fields is set, none
// if the result is empty.
type stepOutput struct {
	ref     *cache.Ref
	mutable *cache.Mutable
}

// prepare acquires everything the process needs. What it acquired before an
// error is close's to give back.
func (s *step) prepare(ctx context.Context) error {
	if err := s.emulate(); err != nil {
		return err
	}
	if err := s.acquireCaches(ctx); err != nil {
		return err
	}
	for _, m := range s.op.Mounts {
		if err := s.prepareMount(ctx, m); err != nil {
			return fmt.Errorf("prepare mount %s: %w", m.Dest, err)
		}
	}
	return nil
}

func (s *step) prepareMount(ctx context.Context, m *pb.Mount) error {
	source, selector, err := s.source(ctx, m)
	if err != nil || source == nil {
		return err
	}
	if m.Dest == pb.RootMount {
		s.root, s.readonlyRoot = source, m.Readonly
		return nil
	}
	s.mounts = append(s.mounts, executor.Mount{
		Dest:     mountTarget(s.op.Meta.Cwd, m.Dest),
		Source:   source,
		Selector: selector,
		Readonly: m.Readonly || m.MountType == pb.MountType_SECRET,
	})
	return nil
}

// source makes what m mounts, and says which path in it. No source is no
// mount: something optional isn't there.
func (s *step) source(ctx context.Context, m *pb.Mount) (source []mount.Mount, selector string, err error) {
	switch m.MountType {
	case pb.MountType_BIND:
		source, err = s.bind(ctx, m)
		return source, m.Selector, err
	case pb.MountType_CACHE:
		return s.cacheMount(m), m.Selector, nil
	case pb.MountType_TMPFS:
		return []mount.Mount{tmpfs(m)}, "", nil
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
func (s *step) bind(ctx context.Context, m *pb.Mount) ([]mount.Mount, error) {
	base := s.input(m)
	if m.Readonly && base != nil && m.Dest != pb.RootMount {
		if hasOutput(m) {
			s.outputs = append(s.outputs, stepOutput{ref: base.Clone()})
		}
		mounts, err := base.Mounts(ctx)
		return mounts, lostInput(int(m.Input), err)
	}
	layer, err := s.loader.cfg.Cache.New(ctx, base, cache.Options{
		Description: fmt.Sprintf("mount %s from exec %s", m.Dest, strings.Join(s.op.Meta.Args, " ")),
	})
	if err != nil {
		return nil, lostInput(int(m.Input), err)
	}
	if hasOutput(m) {
		s.outputs = append(s.outputs, stepOutput{mutable: layer})
	} else {
		s.undo.Add(func() error { return release(ctx, layer) })
	}
	mounts, err := layer.Mounts(ctx, false)
	return mounts, lostInput(int(m.Input), err)
}

// input is the ref that m is based on, nil for none.
func (s *step) input(m *pb.Mount) *cache.Ref {
	if m.Input == int64(pb.Empty) {
		return nil
	}
	return s.inputs[m.Input]
}

func tmpfs(m *pb.Mount) mount.Mount {
	options := []string{"nosuid"}
	if size := m.TmpfsOpt.GetSize(); size > 0 {
		options = append(options, fmt.Sprintf("size=%d", size))
	}
	return mount.Mount{Type: "tmpfs", Source: "tmpfs", Options: options}
}

// commit turns the outputs into results, in the order of the mounts.
func (s *step) commit(ctx context.Context) (_ []solver.Result, err error) {
	for i := range s.outputs {
		out := &s.outputs[i]
		if out.mutable == nil {
			continue
		}
		ref, err := out.mutable.Commit(ctx)
		if err != nil {
			return nil, fmt.Errorf("commit output %d: %w", i, err)
		}
		*out = stepOutput{ref: ref}
	}
	results := make([]solver.Result, len(s.outputs))
	for i, out := range s.outputs {
		results[i] = Result{out.ref}
	}
	s.outputs = nil // the results have them now
	return results, nil
}

// close gives back what the step holds, however it ended.
func (s *step) close(ctx context.Context) error {
	errs := []error{s.undo.Run()}
	for _, out := range s.outputs {
		if out.mutable != nil {
			errs = append(errs, release(ctx, out.mutable))
		} else {
			out.ref.Release()
		}
	}
	s.outputs = nil
	return errors.Join(errs...)
}

// release gives u back though the step's context may have ended.
func release(ctx context.Context, u *cache.Mutable) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
	defer cancel()
	return u.Release(ctx)
}
