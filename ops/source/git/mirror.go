package git

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/moby/buildkit/session"
)

const (
	// remoteIndex finds the mirror of a remote.
	remoteIndex = "git.remote"
	// soundKey is set beside a mirror that is as git left it. A daemon that dies
	// while it has one open leaves none: then it is made anew.
	soundKey = "git.sound"
	// keptRefs hold what was fetched in full.
	keptRefs = "refs/kiln/"
)

// mirror is a bare repository with what was fetched of a remote so far. Who has
// it is alone with it.
type mirror struct {
	*Source
	sp     *spec
	access *access
	u      *cache.Mutable
	dir    string
	reused bool
}

// withMirror calls use with a mirror that holds t. One that turns out damaged
// is replaced, once.
func (s *Source) withMirror(ctx context.Context, sp *spec, t *target, g session.Group, use func(*mirror) error) (err error) {
	done, err := s.mirrors.Take(ctx, sp.url)
	if err != nil {
		return err
	}
	defer done()
	a, err := s.openAccess(ctx, sp, g)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.close()) }()
	for first := true; ; first = false {
		m, err := s.openMirror(ctx, sp, a, len(t.object) == 64, !first)
		if err != nil {
			return err
		}
		if err = m.fetch(ctx, t); err == nil {
			err = use(m)
		}
		if err == nil || !m.reused || !m.damaged(ctx) {
			return errors.Join(s.opts.Cache.SuspectDisk(ctx, err), m.close(ctx))
		}
		progress.From(ctx).Stream(2).Write([]byte("the mirror of " + sp.url + " is damaged and made anew\n"))
		if err := m.u.Discard(context.WithoutCancel(ctx)); err != nil {
			return fmt.Errorf("remove damaged mirror of %s: %w", sp.url, err)
		}
	}
}

// openMirror takes the mirror of last time, or makes one.
func (s *Source) openMirror(ctx context.Context, sp *spec, a *access, sha256, anew bool) (_ *mirror, err error) {
	key := sp.url
	if sha256 {
		key += " (sha256)"
	}
	m := &mirror{Source: s, sp: sp, access: a}
	for _, id := range s.opts.Cache.Search(remoteIndex, key) {
		u, err := s.opts.Cache.GetMutable(ctx, id)
		if errors.Is(err, cache.ErrNotFound) || errors.Is(err, cache.ErrLocked) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("open mirror of %s: %w", sp.url, err)
		}
		if _, sound := u.Metadata(soundKey); sound && !anew && m.u == nil {
			if dir, err := directory(ctx, u); err == nil {
				m.u, m.dir, m.reused = u, dir, true
				continue
			}
		}
		if err := u.Discard(ctx); err != nil {
			return nil, fmt.Errorf("remove mirror of %s: %w", sp.url, err)
		}
	}
	if m.u != nil {
		return m, m.sweep()
	}
	m.u, err = s.opts.Cache.New(ctx, nil, cache.Options{
		Description: "shared git repo for " + sp.url, Index: map[string]string{remoteIndex: key}, Retain: true,
	})
	if err != nil {
		return nil, fmt.Errorf("make mirror of %s: %w", sp.url, err)
	}
	if err := m.init(ctx, sha256); err != nil {
		return nil, errors.Join(fmt.Errorf("make mirror of %s: %w", sp.url, err), m.u.Discard(context.WithoutCancel(ctx)))
	}
	return m, nil
}

func (m *mirror) init(ctx context.Context, sha256 bool) (err error) {
	if m.dir, err = directory(ctx, m.u); err != nil {
		return err
	}
	_, err = command{args: initArgs(sha256, "--bare", m.dir)}.run(ctx)
	return err
}

func initArgs(sha256 bool, more ...string) []string {
	args := []string{"init", "--quiet", "--template="}
	if sha256 {
		args = append(args, "--object-format=sha256")
	}
	return append(args, more...)
}

// directory is where the files of u are. A state on top of none is a directory,
// which needs no mount; git wants to know its way up to the root.
func directory(ctx context.Context, u *cache.Mutable) (string, error) {
	mounts, err := u.Mounts(ctx, false)
	if err != nil {
		return "", err
	}
	if len(mounts) != 1 || mounts[0].Type != "bind" {
		return "", fmt.Errorf("internal error: the empty state %s is %v and not a directory", u.ID(), mounts)
	}
	return mounts[0].Source, nil
}

// sweep removes what a run of git that was ended may have left.
func (m *mirror) sweep() error {
	for _, pattern := range []string{"*.lock", "refs/kiln/*.lock", "objects/pack/tmp_*", "objects/??/tmp_obj_*", "objects/tmp_objdir-*"} {
		left, err := fs.Glob(os.DirFS(m.dir), pattern)
		if err != nil {
			return fmt.Errorf("sweep mirror of %s: %w", m.sp.url, err)
		}
		for _, name := range left {
			if err := os.RemoveAll(filepath.Join(m.dir, name)); err != nil {
				return fmt.Errorf("sweep mirror of %s: %w", m.sp.url, err)
			}
		}
	}
	return nil
}

// close gives the mirror back for the next one. One that nothing is in goes.
func (m *mirror) close(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	if err := m.sweep(); err != nil {
		return errors.Join(err, m.u.Discard(ctx))
	}
	if kept, err := os.ReadDir(filepath.Join(m.dir, keptRefs)); err != nil || len(kept) == 0 {
		return m.u.Discard(ctx)
	}
	m.u.SetMetadata(soundKey, []byte{1})
	if err := m.u.Release(ctx); err != nil {
		return fmt.Errorf("give back mirror of %s: %w", m.sp.url, err)
	}
	return nil
}

// damaged tells whether the mirror is to blame for a failure.
func (m *mirror) damaged(ctx context.Context) bool {
	if ctx.Err() != nil {
		return false
	}
	_, err := m.git(ctx, "fsck", "--no-dangling", "--no-progress")
	return err != nil && ctx.Err() == nil
}

// git works within the mirror.
func (m *mirror) git(ctx context.Context, args ...string) ([]byte, error) {
	return command{args: args, bare: m.dir}.run(ctx)
}

// download runs git fetch. A server that can't send a part of the history is
// asked for all of it.
func (m *mirror) download(ctx context.Context, args ...string) error {
	run := func(options ...string) error {
		args := append(append([]string{"fetch", "--no-tags", "--force", "--progress", "--refmap="}, options...), args...)
		_, err := m.remote(ctx, m.sp, m.access, command{args: args, bare: m.dir})
		return err
	}
	err := run("--depth=1")
	var failed *runError
	if errors.As(err, &failed) && (failed.says("--depth") || failed.says("shallow")) {
		err = run()
	}
	return err
}

// fetch makes sure that the mirror has t and all that a checkout of it needs,
// and that it is what was asked for.
func (m *mirror) fetch(ctx context.Context, t *target) error {
	if _, err := os.Lstat(filepath.Join(m.dir, keptRefs, t.object)); err != nil {
		if err := m.get(ctx, t); err != nil {
			return m.sp.unreachable(ctx, err)
		}
		if _, err := m.git(ctx, "update-ref", keptRefs+t.object, t.object); err != nil {
			return err
		}
	}
	out, err := m.git(ctx, "rev-parse", "--verify", "--end-of-options", t.object+"^{commit}")
	if err != nil {
		return fmt.Errorf("%s of %s is no commit: %w", t.object, m.sp.url, err)
	}
	commit := strings.TrimSpace(string(out))
	if t.commit != "" && t.commit != commit {
		return fmt.Errorf("the remote %s says that tag %s is of commit %s, and it is of %s", m.sp.url, t.object, t.commit, commit)
	}
	if sum := m.sp.checksum; !strings.HasPrefix(commit, sum) && !strings.HasPrefix(t.object, sum) {
		return fmt.Errorf("expected checksum to match %s, got %s", sum, commit)
	}
	return nil
}

// get downloads t: by its ref, which may have moved since it was looked up; by
// its id, which not every server permits; or with the history of all branches
// and tags.
func (m *mirror) get(ctx context.Context, t *target) error {
	if t.ref != t.object && !m.sp.byCommit {
		if err := m.download(ctx, "--", m.sp.url, t.ref); err != nil {
			return err
		}
		if m.has(ctx, t.object) {
			return nil
		}
	}
	err := m.download(ctx, "--", m.sp.url, t.object)
	var failed *runError
	if err == nil || m.sp.byCommit || !errors.As(err, &failed) || !failed.says("not our ref") && !failed.says("unadvertised object") {
		return err
	}
	if err := m.downloadAll(ctx); err != nil {
		return err
	}
	if !m.has(ctx, t.object) {
		return fmt.Errorf("no branch or tag leads to %s", t.object)
	}
	return nil
}

func (m *mirror) downloadAll(ctx context.Context) error {
	args := []string{"fetch", "--no-tags", "--force", "--prune", "--progress", "--refmap="}
	if _, err := os.Lstat(filepath.Join(m.dir, "shallow")); err == nil {
		args = append(args, "--unshallow")
	}
	args = append(args, "--", m.sp.url, "+refs/heads/*:refs/all/heads/*", "+refs/tags/*:refs/all/tags/*")
	_, err := m.remote(ctx, m.sp, m.access, command{args: args, bare: m.dir})
	return err
}

// has tells whether an object that was just fetched is there.
func (m *mirror) has(ctx context.Context, object string) bool {
	_, err := m.git(ctx, "cat-file", "-e", object+"^{commit}")
	return err == nil
}
