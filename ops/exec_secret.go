package ops

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/internal/rootless"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/secrets"
	"github.com/moby/buildkit/solver/pb"
)

// privateFiles is a file system in memory that one mountSet's secrets and sockets
// live in. It is attached nowhere, so that nothing of it is left when the daemon
// is killed, and never written to disk (LLB-047).
type privateFiles struct {
	view  *snapshot.View
	files int
}

// privateDir returns the private file system, made when first needed.
func (s *mountSet) privateDir() (*privateFiles, error) {
	if s.private != nil {
		return s.private, nil
	}
	view, err := openTmpfs()
	if err != nil {
		return nil, fmt.Errorf("make a file system for secrets and sockets: %w", err)
	}
	s.private = &privateFiles{view: view}
	s.undo.Add(view.Close)
	return s.private, nil
}

// openTmpfs opens a tmpfs that isn't swapped where the kernel can do that
// (6.4).
func openTmpfs() (*snapshot.View, error) {
	options := []string{"nosuid", "nodev", "mode=0700"}
	view, err := snapshot.Open([]mount.Mount{{Type: "tmpfs", Source: "tmpfs", Options: append(options, "noswap")}})
	if err == nil {
		return view, nil
	}
	return snapshot.Open([]mount.Mount{{Type: "tmpfs", Source: "tmpfs", Options: options}})
}

// next reserves a name for a file and returns it with its path in this process.
func (p *privateFiles) next() (name, path string) {
	name = strconv.Itoa(p.files)
	p.files++
	return name, filepath.Join(p.view.Path(), name)
}

// bind says how to mount the file system into the step.
func (p *privateFiles) bind(options ...string) []mount.Mount {
	return []mount.Mount{{Type: "bind", Source: p.view.Path(), Options: append([]string{"rbind", "nosuid", "nodev"}, options...)}}
}

// secretFile mounts a file with the secret in it, nothing if the secret is
// optional and nobody has it (LLB-047).
func (s *mountSet) secretFile(ctx context.Context, opt *pb.SecretOpt) (source []mount.Mount, selector string, err error) {
	data, ok, err := s.ops.secret(ctx, s.group, opt.ID, opt.Optional)
	if err != nil || !ok {
		return nil, "", err
	}
	dir, err := s.privateDir()
	if err != nil {
		return nil, "", err
	}
	name, path := dir.next()
	mode := os.FileMode(opt.Mode & 0o777)
	if err := writePrivate(path, data, opt, mode); err != nil {
		return nil, "", fmt.Errorf("write secret %s: %w", opt.ID, err)
	}
	options := []string{"ro"}
	if mode&0o111 == 0 {
		options = append(options, "noexec")
	}
	return dir.bind(options...), name, nil
}

func writePrivate(path string, data []byte, opt *pb.SecretOpt, mode os.FileMode) error {
	if err := os.WriteFile(path, data, 0o600); err != nil {
		return err
	}
	if err := os.Chown(path, int(opt.Uid), int(opt.Gid)); err != nil {
		return rootless.Here().Explain(err, int(opt.Uid), int(opt.Gid))
	}
	return os.Chmod(path, mode)
}

// withoutCores keeps the kernel from writing the memory of a process with secrets
// to a disk when it crashes, unless limits say how much of it may be: 0 bounds
// files, 1 also what a program gets that the machine has for it (core(5)).
func withoutCores(limits []executor.Ulimit, mounts []*pb.Mount, env []*pb.SecretEnv) []executor.Ulimit {
	const core = "core"
	secret := len(env) > 0 || slices.ContainsFunc(mounts, func(m *pb.Mount) bool { return m.MountType == pb.MountType_SECRET })
	if !secret || slices.ContainsFunc(limits, func(l executor.Ulimit) bool { return l.Name == core }) {
		return limits
	}
	return append(limits, executor.Ulimit{Name: core, Soft: 1, Hard: 1})
}

// secret asks the sessions of g for a secret (SES-070). ok is false for one
// that is optional and that nobody has.
func (l *Loader) secret(ctx context.Context, g session.Group, id string, optional bool) (data []byte, ok bool, err error) {
	err = l.cfg.Sessions.Any(ctx, g, func(ctx context.Context, _ string, caller session.Caller) error {
		data, err = secrets.GetSecret(ctx, caller, id)
		return err
	})
	if err == nil {
		return data, true, nil
	}
	if optional && errors.Is(err, secrets.ErrNotFound) {
		return nil, false, nil
	}
	return nil, false, fmt.Errorf("get secret %q: %w", id, err)
}
