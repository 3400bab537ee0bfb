package filetree

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/kilnbuild/kiln/internal/files"
	"golang.org/x/sys/unix"
)

// Copy is what to copy from one tree to another, and how. Where a source lands
// follows these rules, which its test has as a table:
//
//   - Links in front of the last element of either path are followed, inside
//     its own tree. At the end, the destination's is followed; a source's only
//     with FollowLinks.
//   - Directories missing above the destination are made; so is the destination
//     itself if it ends in a slash, or if it takes the contents of a directory.
//   - A file goes into the destination if that is a directory, else onto it.
//   - A directory goes into the destination if anything is there, else onto it.
//     With Contents what is in it goes into the destination instead, and so does
//     that of a source that ends in "/.".
//   - Directories are merged. Nested ones take the source's metadata; the
//     topmost, if it was there, only its time. A file or link replaces anything
//     but a directory. Other differences of kind are errors, unless Replace lets
//     the source win.
type Copy struct {
	Src, Dest string

	FollowLinks bool // copy what a link that is the source leads to
	Contents    bool // copy what is in a directory, not itself
	MakeParents bool // of the destination; without, it is an error if they are missing
	Replace     bool // what is there, whatever its kind
	Wildcards   bool // in Src; what they match goes by its own name
	AllowNone   bool // wildcards that match nothing are no error
	Unpack      bool // sources that are archives, instead of copying them (LLB-071)

	// Include and Exclude are patterns of what below a source is copied (LLB-074).
	Include, Exclude []string
	// Required are paths of which something must be copied (LLB-075). They count
	// with Include only.
	Required []string

	Stamp Stamp // of copies; by default they keep their source's owner and times
	Chmod Chmod

	// Witness, unless nil, is asked of each directory and file that is read, below
	// src without a slash in front; its error ends the copy.
	Witness func(ctx context.Context, path string, st *unix.Stat_t) error
}

// copying is one run of a Copy.
type copying struct {
	*Copy
	src, dst Root
	missing  []string // required paths that nothing copied is under yet
}

// read asks the witness of what is read at the resolved path p.
func (c *Copy) read(ctx context.Context, p string, st *unix.Stat_t) error {
	if c.Witness == nil {
		return nil
	}
	return c.Witness(ctx, strings.TrimPrefix(p, "/"), st)
}

// Run copies from src to dst. A failure may leave some of the copies.
func (c *Copy) Run(ctx context.Context, src, dst Root) error {
	run := &copying{Copy: c, src: src, dst: dst}
	if len(c.Include) > 0 {
		run.missing = slices.Clone(c.Required)
	}
	return run.all(ctx)
}

// all copies every source.
func (c *copying) all(ctx context.Context) error {
	src, dest := cleanPath(c.Src), cleanPath(c.Dest)
	if !c.MakeParents {
		if err := c.checkParent(dest); err != nil {
			return err
		}
	}
	sources := []string{src}
	if c.Wildcards {
		var err error
		if sources, err = c.src.wildcards(src, c.FollowLinks); err != nil {
			return err
		}
		if len(sources) == 0 && !c.AllowNone {
			return &noMatchError{src}
		}
	}
	for _, s := range sources {
		if c.Unpack {
			done, err := c.unpack(ctx, s, dest)
			if err != nil {
				return err
			}
			if done {
				continue
			}
		}
		if err := c.one(ctx, s, dest); err != nil {
			return err
		}
	}
	if len(c.missing) > 0 {
		return &missingError{c.missing[0]}
	}
	return nil
}

// found notes that p, a path of the source as it was asked for, is copied.
func (c *copying) found(p string) {
	if len(c.missing) > 0 {
		c.missing = slices.DeleteFunc(c.missing, func(prefix string) bool { return strings.HasPrefix(p, prefix) })
	}
}

// missingError is a source that isn't there, or a required path (LLB-075)
// that include patterns miss. It reads like that of the content digest, which
// finds the same before if the solver asks it: clients look for "not found".
type missingError struct{ path string }

func (e *missingError) Error() string        { return fmt.Sprintf("%q: not found", e.path) }
func (e *missingError) Is(target error) bool { return target == fs.ErrNotExist }

// noMatchError is a pattern that nothing matches.
type noMatchError struct{ pattern string }

func (e *noMatchError) Error() string        { return e.pattern + " not found" }
func (e *noMatchError) Is(target error) bool { return target == fs.ErrNotExist }

// checkParent refuses a destination whose parent doesn't exist (LLB-072).
func (c *copying) checkParent(dest string) error {
	p, err := c.dst.resolve(dest, true)
	if err != nil {
		return err
	}
	if _, err := c.dst.lstat(path.Dir(p)); err != nil {
		return fmt.Errorf("parent of destination %s: %w", c.Dest, err)
	}
	return nil
}

// one copies the one source src.
func (c *copying) one(ctx context.Context, src, dest string) (err error) {
	var made []string
	defer func() {
		if err == nil {
			err = c.dst.touchAll(made, c.Stamp)
		}
	}()
	mkdirAll := func(p string) error {
		dirs, err := c.dst.mkdirAll(p, c.Chmod.parents(), c.Stamp)
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
	if _, err := c.dst.lstat(target); errors.Is(err, unix.ENOENT) && files.IsDir(&st) && c.Contents {
		into = target
	}
	if err := mkdirAll(into); err != nil {
		return err
	}
	return c.tree(ctx, path.Join("/", src), from, st, target)
}

// source finds what src names.
func (c *copying) source(src string) (string, unix.Stat_t, error) {
	clean := path.Join("/", src)
	at, err := c.src.resolve(clean, c.FollowLinks)
	if err != nil {
		return "", unix.Stat_t{}, err
	}
	st, err := c.src.lstat(at)
	if errors.Is(err, unix.ENOENT) {
		err = &missingError{clean}
	}
	return at, st, err
}

// target decides where the source called src lands, dest being the resolved
// destination. Its last element, if that is src's own, is not resolved: a link
// there is replaced.
func (c *copying) target(dest, src string, st unix.Stat_t) (string, error) {
	dst, err := c.dst.lstat(dest)
	if errors.Is(err, unix.ENOENT) {
		return dest, nil
	}
	if err != nil {
		return "", err
	}
	if files.IsDir(&st) && !c.Contents || !files.IsDir(&st) && files.IsDir(&dst) {
		return path.Join(dest, path.Base(src)), nil
	}
	return dest, nil
}

// cleanPath makes p absolute and clean but keeps "/" and "/." at its end,
// which matter to copies (LLB-067).
func cleanPath(p string) string {
	clean := path.Join("/", p)
	switch {
	case strings.HasSuffix(p, "/.") && clean == "/":
		return "/."
	case strings.HasSuffix(p, "/."):
		return clean + "/."
	case strings.HasSuffix(p, "/") && clean != "/":
		return clean + "/"
	}
	return clean
}
