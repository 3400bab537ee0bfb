package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/kilnbuild/kiln/internal/files"
	"golang.org/x/sys/unix"
)

// form says what stands for a layer on top of something else than its parent.
//
// Overlay writes layers that are right on their parent only: an opaque directory
// hides whatever is below it, not only what the parent has there, and what a
// process only touched is copied into the layer, where it hides other versions of
// it. As a tar (see changeWalk) a layer has neither, and on top of anything else
// than its parent it means what its tar means.
type form string

const (
	formUnknown form = ""
	formOwn     form = "own"  // the layer itself: it is as its tar
	formCopy    form = "copy" // what is at portablePath, with hard links to the layer's files
)

// portablePrefix is what the names of copies start with; no snapshot's does.
const portablePrefix = "+"

func (o *Overlay) portablePath(id string) string { return o.dir + "/" + portablePrefix + id }

// copyOf returns the snapshot whose copy has that name in the directory of all.
func copyOf(name string) (id string, ok bool) { return strings.CutPrefix(name, portablePrefix) }

// homeLocked says whether s stands on its own parent, if below are the layers
// below it.
func (o *Overlay) homeLocked(s *snap, below []string) bool {
	if len(below) == 0 || s.Parent == "" {
		return len(below) == 0 && s.Parent == ""
	}
	chain, err := o.flatLocked(s.Parent)
	if err != nil || len(chain) != len(below) {
		return false
	}
	for i := range chain {
		if chain[i] != below[i] {
			return false
		}
	}
	return true
}

// abroad returns the layers of id of which it isn't known what stands for them
// where they are in it. A layer that was written on nothing is right anywhere.
func (o *Overlay) abroad(id string) ([]string, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	flat, err := o.flatLocked(id)
	if err != nil {
		return nil, err
	}
	var out []string
	home := true // is the layer before
	for i, l := range flat {
		s := o.snaps[l]
		home = home && i > 0 && s.Parent == flat[i-1] || o.homeLocked(s, flat[:i])
		if !home && s.Parent != "" && s.Form != formOwn {
			out = append(out, l)
		}
	}
	return out, nil
}

// makePortable sees to it that there is something that stands for the layer id on
// top of anything. made: that takes space.
func (o *Overlay) makePortable(ctx context.Context, id string) (made bool, err error) {
	for {
		o.mu.Lock()
		s, err := o.getLocked(id)
		if err != nil {
			o.mu.Unlock()
			return false, err
		}
		known, other, doubts := s.Form, o.copying[id], o.doubts.n
		if other == nil && known == formUnknown {
			o.copying[id] = make(chan struct{})
		}
		o.mu.Unlock()
		switch {
		case other != nil:
			select {
			case <-other:
				continue
			case <-ctx.Done():
				return false, context.Cause(ctx)
			}
		case known == formCopy:
			if _, err := os.Lstat(o.portablePath(id)); !errors.Is(err, os.ErrNotExist) {
				return false, err
			}
			o.setForm(id, formUnknown) // somebody removed it
			continue
		case known == formOwn:
			return false, nil
		}
		found, err := o.findForm(ctx, id)
		o.mu.Lock()
		if err == nil {
			err = o.doubts.since(doubts)
		}
		close(o.copying[id])
		delete(o.copying, id)
		o.mu.Unlock()
		if err != nil {
			return false, fmt.Errorf("make layer %s fit for another parent: %w", id, err)
		}
		o.setForm(id, found)
		return found == formCopy, nil
	}
}

func (o *Overlay) setForm(id string, f form) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if s := o.snaps[id]; s != nil {
		s.Form, s.stored, s.written = f, false, time.Now()
	}
}

// findForm looks at the layer id, and copies it if it isn't as its tar.
func (o *Overlay) findForm(ctx context.Context, id string) (_ form, err error) {
	layer, err := o.layer(id)
	if err != nil {
		return "", err
	}
	parent, err := openSnapshot(ctx, o, layer.parent)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, parent.Close()) }()
	var check foreignCheck
	if err := walkChanges(ctx, layer, parent, &check, true); err != nil || !check.found {
		return formOwn, err
	}
	return formCopy, o.copyLayer(ctx, id, layer, parent)
}

// foreignCheck looks for what is right on a layer's own parent only.
type foreignCheck struct{ found bool }

func (c *foreignCheck) foreign()                                    { c.found = true }
func (c *foreignCheck) dir(*changeDir) error                        { return nil }
func (c *foreignCheck) leave(*changeDir) error                      { return nil }
func (c *foreignCheck) file(*changeDir, string, *unix.Stat_t) error { return nil }
func (c *foreignCheck) whiteout(*changeDir, string) error           { return nil }

// copyLayer makes the copy of the layer id.
func (o *Overlay) copyLayer(ctx context.Context, id string, layer layerInfo, parent *View) (err error) {
	path := o.portablePath(id)
	if err := os.RemoveAll(path); err != nil { // of an earlier attempt
		return err
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(path))
		}
	}()
	fd, err := files.OpenDir(unix.AT_FDCWD, path)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	c := &layerCopier{ctx: ctx, walker: walker{root: &layerDir{path: "/", fd: fd, lower: -1}, xattr: layer.xattr}}
	defer func() { err = errors.Join(err, c.close()) }()
	return walkChanges(ctx, layer, parent, c, true)
}

// layerCopier writes changes as a layer directory, with hard links to the files.
type layerCopier struct {
	ctx    context.Context
	walker // of the copy
	open   []*layerDir
	begun  bool // the root is, or was, among open
}

// close closes what isn't closed yet. That it can't is an error: a descriptor that
// is closed twice may be somebody else's by then.
func (c *layerCopier) close() error {
	if !c.begun {
		c.open = append(c.open, c.root)
	}
	var errs []error
	for _, d := range c.open {
		errs = append(errs, unix.Close(d.fd))
	}
	return errors.Join(errs...)
}

func (c *layerCopier) foreign() {}

func (c *layerCopier) dir(d *changeDir) error {
	if d.parent == nil {
		d.copy, c.begun = c.root, true
	} else {
		if err := unix.Mkdirat(d.parent.copy.fd, d.name, 0o700); err != nil {
			return fmt.Errorf("make directory /%s: %w", d.path, err)
		}
		fd, err := files.OpenDir(d.parent.copy.fd, d.name)
		if err != nil {
			return fmt.Errorf("open the copy of /%s: %w", d.path, err)
		}
		d.copy = &layerDir{path: "/" + d.path, fd: fd}
	}
	d.copy.lower = d.fd
	c.open = append(c.open, d.copy)
	return nil
}

func (c *layerCopier) leave(d *changeDir) error {
	c.open = c.open[:len(c.open)-1]
	err := copyMeta(d.fd, d.copy.fd)
	if err := errors.Join(err, unix.Close(d.copy.fd)); err != nil {
		return fmt.Errorf("copy the metadata of /%s: %w", d.path, err)
	}
	return nil
}

func (c *layerCopier) file(in *changeDir, name string, st *unix.Stat_t) error {
	if err := linkOrCopy(c.ctx, in.fd, in.copy.fd, name, st); err != nil {
		return fmt.Errorf("copy /%s%s: %w", in.path, name, err)
	}
	return nil
}

func (c *layerCopier) whiteout(in *changeDir, name string) error {
	if err := c.makeWhiteout(in.copy, name); err != nil {
		return fmt.Errorf("delete /%s%s: %w", in.path, name, err)
	}
	return nil
}
