package git

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"golang.org/x/sys/unix"
)

// checkOut writes t's files to a record.
func (i *instance) checkOut(ctx context.Context, m *mirror, t *target, key string) (_ *cache.Ref, err error) {
	u, err := i.opts.Cache.New(ctx, nil, cache.Options{
		Description: "git snapshot for " + i.spec.url + "#" + i.spec.ref,
		Type:        cache.TypeGit,
		Index:       map[string]string{snapshotIndex: key},
	})
	if err != nil {
		return nil, fmt.Errorf("make record for checkout of %s: %w", i.spec.url, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, u.Discard(context.WithoutCancel(ctx)))
		}
	}()
	dir, err := directory(ctx, u)
	if err != nil {
		return nil, err
	}
	w := &worktree{sp: &i.spec, m: m, t: t, dir: dir}
	if err := w.fill(ctx); err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, fmt.Errorf("failed to checkout remote %s: %w", i.spec.url, err)
	}
	return u.Commit(ctx)
}

// worktree is a checkout being made.
type worktree struct {
	sp   *spec
	m    *mirror
	t    *target
	dir  string // of the result
	work string // where git works: dir, or a directory in it
}

// fill makes dir what the spec asks for.
func (w *worktree) fill(ctx context.Context) error {
	w.work = w.dir
	if w.sp.subdir != "" {
		w.work = filepath.Join(w.dir, ".checkout-"+rand.Text())
		if err := os.Mkdir(w.work, 0o700); err != nil {
			return err
		}
	}
	steps := []func(context.Context) error{w.init, w.populate, w.submodules}
	if w.kept() {
		steps = append(steps, w.tidy)
	} else {
		steps = append(steps, w.dropGitDirs, w.narrow)
	}
	if w.sp.commitTimes {
		steps = append(steps, w.setTimes)
	}
	for _, step := range steps {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// kept says whether .git is part of the result.
func (w *worktree) kept() bool { return w.sp.keepDir && w.sp.subdir == "" }

// git works in the checkout.
func (w *worktree) git(ctx context.Context, args ...string) ([]byte, error) {
	return command{args: args, dir: w.work, advice: w.sp.advice}.run(ctx)
}

func (w *worktree) init(ctx context.Context) error {
	_, err := command{args: initArgs(len(w.t.object) == 64, w.work)}.run(ctx)
	return err
}

// populate gets the objects, or, where .git goes again, borrows them, and
// writes the files.
func (w *worktree) populate(ctx context.Context) error {
	if w.kept() {
		refspec := keptRefs + w.t.object
		if w.t.ref != w.t.object {
			refspec += ":" + w.t.ref
		}
		_, err := command{
			args: []string{"fetch", "--quiet", "--no-tags", "--depth=1", "--update-head-ok", "--no-write-fetch-head", "--", w.m.dir, refspec},
			dir:  w.work, protocols: "file",
		}.run(ctx)
		if err != nil {
			return err
		}
	} else {
		alternates := filepath.Join(w.work, ".git/objects/info/alternates")
		if err := os.MkdirAll(filepath.Dir(alternates), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(alternates, []byte(w.m.dir+"/objects\n"), 0o644); err != nil {
			return err
		}
	}
	_, err := w.git(ctx, "checkout", "--quiet", "--force", "--detach", w.t.object)
	return err
}

// submodules fetches what the repository says, which may not be a file of this
// machine (LLB-104).
func (w *worktree) submodules(ctx context.Context) error {
	if w.kept() || w.hasSubmodules() {
		// What relative URLs are relative to, and what is told of where it all came from.
		if _, err := w.git(ctx, "remote", "add", "origin", w.sp.url); err != nil {
			return err
		}
	}
	if !w.hasSubmodules() {
		return nil
	}
	update := func(options ...string) error {
		_, err := w.m.remote(ctx, w.sp, w.m.access, command{
			args: append([]string{"submodule", "update", "--init", "--recursive", "--progress"}, options...), dir: w.work,
		})
		return err
	}
	err := update("--depth=1")
	var failed *runError
	if errors.As(err, &failed) && (failed.says("--depth") || failed.says("shallow")) {
		err = update()
	}
	if err != nil {
		return fmt.Errorf("failed to update submodules: %w", err)
	}
	return nil
}

func (w *worktree) hasSubmodules() bool {
	if w.sp.skipSubmodules {
		return false
	}
	fi, err := os.Lstat(filepath.Join(w.work, ".gitmodules"))
	return err == nil && fi.Mode().IsRegular()
}

// tidy removes from a kept .git what differs each time or names this machine.
func (w *worktree) tidy(context.Context) error {
	for _, name := range []string{"FETCH_HEAD", "ORIG_HEAD", "logs"} {
		if err := os.RemoveAll(filepath.Join(w.work, ".git", name)); err != nil {
			return err
		}
	}
	return nil
}

// dropGitDirs removes .git and, of submodules, the files that lead into it. No
// tracked file has that name.
func (w *worktree) dropGitDirs(context.Context) error {
	root, err := os.OpenRoot(w.work)
	if err != nil {
		return err
	}
	defer root.Close()
	submodules := w.hasSubmodules()
	if err := root.RemoveAll(".git"); err != nil || !submodules {
		return err
	}
	return fs.WalkDir(root.FS(), ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.Name() != ".git" {
			return err
		}
		if err := root.RemoveAll(p); err != nil {
			return err
		}
		if d.IsDir() {
			return fs.SkipDir
		}
		return nil
	})
}

// narrow makes the subdirectory all there is. It is reached through directories
// alone: a link could lead anywhere.
func (w *worktree) narrow(context.Context) error {
	if w.sp.subdir == "" {
		return nil
	}
	root, err := os.OpenRoot(w.dir)
	if err != nil {
		return err
	}
	defer root.Close()
	at := filepath.Base(w.work)
	for part := range strings.SplitSeq(w.sp.subdir, "/") {
		at = filepath.Join(at, part)
		fi, err := root.Lstat(at)
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("subdirectory %s: there is no %s in the repository", w.sp.subdir, part)
		}
		if err != nil {
			return err
		}
		if !fi.IsDir() {
			return fmt.Errorf("subdirectory %s: %s is not a directory", w.sp.subdir, part)
		}
	}
	entries, err := fs.ReadDir(root.FS(), at)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := root.Rename(filepath.Join(at, e.Name()), e.Name()); err != nil {
			return err
		}
	}
	return root.RemoveAll(filepath.Base(w.work))
}

// setTimes gives everything the time of the commit (LLB-105).
func (w *worktree) setTimes(ctx context.Context) error {
	out, err := w.m.git(ctx, "log", "-1", "--format=%ct", w.t.object+"^{commit}")
	if err != nil {
		return err
	}
	seconds, err := strconv.ParseInt(strings.TrimSpace(string(out)), 10, 64)
	if err != nil {
		return fmt.Errorf("time of commit %s: %w", w.t.object, err)
	}
	at, err := unix.TimeToTimespec(time.Unix(seconds, 0))
	if err != nil {
		return fmt.Errorf("time of commit %s: %w", w.t.object, err)
	}
	return filepath.WalkDir(w.dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		return unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{at, at}, unix.AT_SYMLINK_NOFOLLOW)
	})
}
