package ops

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/kilnbuild/kiln/internal/files"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/patternmatcher"
	mode "github.com/tonistiigi/dchapes-mode"
	"golang.org/x/sys/unix"
)

// fileCopy is one copy action: from src to dst. Where a source lands follows
// these rules, which its test has as a table:
//
//   - Links in front of the last element of either path are followed, inside
//     its own state. At the end, the destination's is followed; a source's only
//     with followSymlink.
//   - Directories missing above the destination are made; so is the destination
//     itself if it ends in a slash, or if it takes the contents of a directory.
//   - A file goes into the destination if that is a directory, else onto it.
//   - A directory goes into the destination if anything is there, else onto it.
//     With dirCopyContents what is in it goes into the destination instead, and
//     so does that of a source that ends in "/.".
//   - Directories are merged. Nested ones take the source's metadata; the
//     topmost, if it was there, only its time. A file or link replaces anything
//     but a directory. Other differences of kind are errors, unless
//     alwaysReplaceExistingDestPaths lets the source win.
type fileCopy struct {
	src, dst fileRoot
	action   *pb.FileActionCopy
	stamp    fileStamp
	chmod    fileChmod
	missing  []string // required paths that nothing copied is under yet
}

func newFileCopy(src, dst fileRoot, a *pb.FileActionCopy, owner *fileIDs) (*fileCopy, error) {
	c := &fileCopy{src: src, dst: dst, action: a, stamp: fileStamp{owner, fileTime(a.Timestamp)}}
	if len(a.IncludePatterns) > 0 {
		c.missing = slices.Clone(a.RequiredPaths)
	}
	c.chmod.fixed = int(a.Mode)
	if a.ModeStr != "" {
		set, err := mode.ParseWithUmask(a.ModeStr, 0)
		if err != nil {
			return nil, fmt.Errorf("mode %q: %w", a.ModeStr, err)
		}
		c.chmod = fileChmod{set: &set, fixed: -1}
	}
	return c, nil
}

func (c *fileCopy) run(ctx context.Context) error {
	src, dest := fileCleanPath(c.action.Src), fileCleanPath(c.action.Dest)
	if !c.action.CreateDestPath {
		if err := c.checkParent(dest); err != nil {
			return err
		}
	}
	sources := []string{src}
	if c.action.AllowWildcard {
		var err error
		if sources, err = c.src.wildcards(src, c.action.FollowSymlink); err != nil {
			return err
		}
		if len(sources) == 0 && !c.action.AllowEmptyWildcard {
			return &noMatchError{src}
		}
	}
	for _, s := range sources {
		if c.action.AttemptUnpackDockerCompatibility {
			done, err := c.unpack(ctx, s, dest)
			if err != nil {
				return err
			}
			if done {
				continue
			}
		}
		if err := c.copy(ctx, s, dest); err != nil {
			return err
		}
	}
	if len(c.missing) > 0 {
		return &fileMissingError{c.missing[0]}
	}
	return nil
}

// found notes that p, a path of the source as it was asked for, is copied.
func (c *fileCopy) found(p string) {
	if len(c.missing) > 0 {
		c.missing = slices.DeleteFunc(c.missing, func(prefix string) bool { return strings.HasPrefix(p, prefix) })
	}
}

// fileMissingError is a source that isn't there, or a required path (LLB-075)
// that include patterns miss. It reads like that of the content digest, which
// finds the same before if the solver asks it: clients look for "not found".
type fileMissingError struct{ path string }

func (e *fileMissingError) Error() string        { return fmt.Sprintf("%q: not found", e.path) }
func (e *fileMissingError) Is(target error) bool { return target == fs.ErrNotExist }

// noMatchError is a pattern that nothing matches.
type noMatchError struct{ pattern string }

func (e *noMatchError) Error() string        { return e.pattern + " not found" }
func (e *noMatchError) Is(target error) bool { return target == fs.ErrNotExist }

// checkParent refuses a destination whose parent doesn't exist (LLB-072).
func (c *fileCopy) checkParent(dest string) error {
	p, err := c.dst.resolve(dest, true)
	if err != nil {
		return err
	}
	if _, err := c.dst.lstat(path.Dir(p)); err != nil {
		return fmt.Errorf("parent of destination %s: %w", c.action.Dest, err)
	}
	return nil
}

// copy copies the one source src.
func (c *fileCopy) copy(ctx context.Context, src, dest string) (err error) {
	var made []string
	defer func() {
		if err == nil {
			err = c.dst.touchAll(made, c.stamp)
		}
	}()
	mkdirAll := func(p string) error {
		dirs, err := c.dst.mkdirAll(p, c.chmod.parents(), c.stamp)
		made = append(made, dirs...)
		return err
	}

	above, last := path.Split(dest)
	if last == "" || last == "." {
		above = dest
	}
	above, err = c.dst.resolve(above, true)
	if err != nil {
		return err
	}
	if err := mkdirAll(above); err != nil {
		return err
	}
	target, err := c.dst.resolve(path.Clean(dest), true)
	if err != nil {
		return err
	}
	from, st, err := c.source(src)
	if err != nil {
		return err
	}
	if target, err = c.target(target, src, st); err != nil {
		return err
	}
	into := path.Dir(target)
	if _, err := c.dst.lstat(target); errors.Is(err, unix.ENOENT) && files.IsDir(&st) && c.action.DirCopyContents {
		into = target
	}
	if err := mkdirAll(into); err != nil {
		return err
	}
	return c.tree(ctx, path.Join("/", src), from, st, target)
}

// source finds what src names.
func (c *fileCopy) source(src string) (string, unix.Stat_t, error) {
	clean := path.Join("/", src)
	at, err := c.src.resolve(clean, c.action.FollowSymlink)
	if err != nil {
		return "", unix.Stat_t{}, err
	}
	st, err := c.src.lstat(at)
	if errors.Is(err, unix.ENOENT) {
		err = &fileMissingError{clean}
	}
	return at, st, err
}

// target decides where the source called src lands, dest being the resolved
// destination. Its last element, if that is src's own, is not resolved: a link
// there is replaced.
func (c *fileCopy) target(dest, src string, st unix.Stat_t) (string, error) {
	dst, err := c.dst.lstat(dest)
	if errors.Is(err, unix.ENOENT) {
		return dest, nil
	}
	if err != nil {
		return "", err
	}
	if files.IsDir(&st) && !c.action.DirCopyContents || !files.IsDir(&st) && files.IsDir(&dst) {
		return path.Join(dest, path.Base(src)), nil
	}
	return dest, nil
}

// filePatterns are what below the source is copied (LLB-074).
type filePatterns struct {
	include, exclude *patternmatcher.PatternMatcher
}

// filePatternInfo is what is known of a directory's match when those of what is
// in it are asked for.
type filePatternInfo struct{ include, exclude patternmatcher.MatchInfo }

func newFilePatterns(a *pb.FileActionCopy) (p filePatterns, err error) {
	if len(a.IncludePatterns) > 0 {
		if p.include, err = patternmatcher.New(a.IncludePatterns); err != nil {
			return p, fmt.Errorf("include patterns %q: %w", a.IncludePatterns, err)
		}
	}
	if len(a.ExcludePatterns) > 0 {
		if p.exclude, err = patternmatcher.New(a.ExcludePatterns); err != nil {
			return p, fmt.Errorf("exclude patterns %q: %w", a.ExcludePatterns, err)
		}
	}
	return p, nil
}

func (p filePatterns) none() bool { return p.include == nil && p.exclude == nil }

// match reports whether rel is copied and, if not, whether something below it
// may be.
func (p filePatterns) match(rel string, parent filePatternInfo) (copied, below bool, info filePatternInfo, err error) {
	copied, below = true, true
	if p.include != nil {
		if copied, info.include, err = p.include.MatchesUsingParentResults(rel, parent.include); err != nil {
			return false, false, info, fmt.Errorf("match %q against include patterns: %w", rel, err)
		}
	}
	if p.exclude != nil {
		var excluded bool
		if excluded, info.exclude, err = p.exclude.MatchesUsingParentResults(rel, parent.exclude); err != nil {
			return false, false, info, fmt.Errorf("match %q against exclude patterns: %w", rel, err)
		}
		if excluded {
			copied, below = false, p.exclude.Exclusions()
		}
	}
	return copied, below, info, nil
}
