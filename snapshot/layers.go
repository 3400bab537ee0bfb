package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// maxLayers is what the kernel's overlay can stack.
const maxLayers = 500

// Mounts says how to make id visible. An active snapshot is writable
// unless readonly is set; a committed one is always read-only.
//
// An overlay must not be mounted for writing twice. Open and Attach see to that
// by sharing one mount; who mounts on its own has to.
func (o *Overlay) Mounts(ctx context.Context, id string, readonly bool) ([]mount.Mount, error) {
	o.mu.Lock()
	s, err := o.getLocked(id)
	var layers []string
	if err == nil && s.Committed {
		_, err = o.soundGetLocked(id)
	}
	if err == nil {
		layers, err = o.layersLocked(id)
	}
	if err != nil {
		o.mu.Unlock()
		return nil, err
	}
	writable := !readonly && !s.Committed
	alone := len(layers) == 1 && o.aloneLocked(s)
	o.mu.Unlock()

	if len(layers) == 1 && !alone {
		// Overlay wants two. The other one is empty.
		empty, err := o.emptyDir()
		if err != nil {
			return nil, fmt.Errorf("mount snapshot %s: %w", id, err)
		}
		layers = []string{empty, layers[0]}
	}
	switch {
	case alone && writable:
		return []mount.Mount{bind(layers[0], "rw")}, nil
	case alone:
		return []mount.Mount{bind(layers[0], "ro")}, nil
	case writable:
		work := o.path(id) + "/work"
		lower, upper := layers[:len(layers)-1], layers[len(layers)-1]
		if err := shares.unlessMounted(upper, func() error { return resetWork(work) }); err != nil {
			return nil, fmt.Errorf("mount snapshot %s: %w", id, err)
		}
		return o.overlay(id, lower, "upperdir="+upper, "workdir="+work)
	}
	return o.overlay(id, layers)
}

func bind(dir, access string) mount.Mount {
	return mount.Mount{Type: "bind", Source: dir, Options: []string{access, "rbind"}}
}

// overlay describes an overlay mount of layers, lowest first.
func (o *Overlay) overlay(id string, layers []string, options ...string) ([]mount.Mount, error) {
	if len(layers) > maxLayers {
		return nil, fmt.Errorf("mount snapshot %s: it has %d layers, and the kernel's overlay can stack %d", id, len(layers), maxLayers)
	}
	layers = slices.Clone(layers)
	slices.Reverse(layers)
	all := append(options, "lowerdir="+strings.Join(layers, ":"))
	for _, opt := range o.options {
		if opt != "volatile" || len(options) > 0 { // read-only mounts write nothing
			all = append(all, opt)
		}
	}
	if len(options) == 0 {
		all = append(all, "ro")
	}
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: all}}, nil
}

// aloneLocked says whether the only layer of s holds no whiteouts, so that it
// can be shown as it is: it had nothing below it when it was written, and its tar
// deletes nothing either; or it is a ground.
func (o *Overlay) aloneLocked(s *snap) bool {
	if s.Ground {
		return true
	}
	for len(s.Layers) > 0 {
		if s = o.snaps[s.Layers[len(s.Layers)-1]]; s == nil {
			return false
		}
	}
	return s.Parent == "" && !s.Deletes
}

// layersLocked returns the layer directories of id, lowest first. For a layer
// that isn't on top of its own parent there stands its portable copy, and for all
// that a snapshot with a ground stands for, that.
func (o *Overlay) layersLocked(id string) ([]string, error) {
	above, ground, err := o.walkLocked(id, true)
	if err != nil {
		return nil, err
	}
	flat, out := above, make([]string, 0, len(above)+1)
	if ground != "" {
		if flat, err = o.flatLocked(id); err != nil {
			return nil, err
		}
		out = append(out, o.groundPath(ground))
	}
	for i := len(flat) - len(above); i < len(flat); i++ {
		dir := o.fsPath(flat[i])
		if s := o.snaps[flat[i]]; s.Form == formCopy && !o.homeLocked(s, flat[:i]) {
			dir = o.portablePath(flat[i])
		}
		out = append(out, dir)
	}
	return out, nil
}

// flatLocked returns the ids of the layers of id, lowest first.
func (o *Overlay) flatLocked(id string) ([]string, error) {
	flat, _, err := o.walkLocked(id, false)
	return flat, err
}

// walkLocked returns the ids of the layers of id, lowest first: those above the
// first snapshot with a ground, and that snapshot, if grounds are wanted and there
// is one.
//
// A layer that occurs more than once counts at its last occurrence: whatever an
// earlier one would add is added again later, and whatever layers in between
// take away from it is back. Overlay refuses the same directory twice. Nothing
// counts that is below a layer with an opaque root, which overlay doesn't know.
func (o *Overlay) walkLocked(id string, grounds bool) (flat []string, ground string, err error) {
	var all []string         // top first
	var seen map[string]bool // nil without a stack, as a chain has each layer once
	for id != "" {
		s := o.snaps[id]
		if s == nil {
			return nil, "", fmt.Errorf("snapshot %q: %w", id, ErrNotFound)
		}
		if grounds && s.Ground {
			ground = id
			break
		}
		n := len(all)
		if all, err = o.ownLocked(all, s); err != nil {
			return nil, "", err
		}
		slices.Reverse(all[n:])
		if len(s.Layers) > 0 && seen == nil {
			seen = map[string]bool{}
		}
		id = s.Parent
	}
	out := all[:0]
	for _, l := range all {
		if !seen[l] {
			out = append(out, l)
		}
		if seen != nil {
			seen[l] = true
		}
		if o.snaps[l].Clears {
			ground = ""
			break
		}
	}
	slices.Reverse(out)
	return out, ground, nil
}

// ownLocked appends the ids of the layers that s consists of without its
// parents, lowest first.
func (o *Overlay) ownLocked(out []string, s *snap) ([]string, error) {
	if len(s.Layers) == 0 {
		return append(out, s.id), nil
	}
	for _, id := range s.Layers {
		l := o.snaps[id]
		if l == nil {
			return nil, fmt.Errorf("snapshot %q, a layer of %q: %w", id, s.id, ErrNotFound)
		}
		var err error
		if out, err = o.ownLocked(out, l); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// emptyPath is no snapshot's, as its name is no valid id.
func (o *Overlay) emptyPath() string { return o.dir + "/.empty" }

// emptyDir returns a directory that stays empty.
func (o *Overlay) emptyDir() (string, error) {
	dir := o.emptyPath()
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return "", err
	}
	return dir, nil
}

// resetWork makes sure that the work directory is there, and clears the mark
// that a volatile mount leaves in it, with which the kernel refuses to mount it
// again. A crash means nothing for us, as a snapshot whose record survives was
// synced.
func resetWork(work string) error {
	mark := work + "/work/incompat/volatile"
	err := unix.Rmdir(mark)
	if err == unix.ENOTEMPTY {
		if err = unix.Unlink(mark + "/dirty"); err == nil {
			err = unix.Rmdir(mark)
		}
	}
	switch err {
	case nil:
		return nil
	case unix.ENOENT, unix.ENOTDIR:
	default:
		return fmt.Errorf("clear %s: %w", work, err)
	}
	// A snapshot that was committed and reopened has no work directory.
	if err := unix.Mkdir(work, 0o700); err != nil && err != unix.EEXIST {
		return fmt.Errorf("make %s: %w", work, gone(err))
	}
	return nil
}

// clearWork removes an overlay's work directory, which has a known shape unless
// a crash left something.
func clearWork(work string) error {
	if err := unix.Unlink(work + "/work/incompat/volatile/dirty"); err != nil && err != unix.ENOENT && err != unix.ENOTDIR {
		return fmt.Errorf("clear %s: %w", work, err)
	}
	for _, sub := range []string{"/work/incompat/volatile", "/work/incompat", "/work", ""} {
		switch err := unix.Rmdir(work + sub); err {
		case nil, unix.ENOENT:
		default:
			return os.RemoveAll(work)
		}
	}
	return nil
}

// probeOverlay finds out which mount options the kernel has, and that overlay
// works on the file system of dir at all.
func probeOverlay(dir string, userxattr bool) ([]string, error) {
	tmp, err := os.MkdirTemp(dir, ".probe-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	for _, sub := range []string{"lower", "upper", "work"} {
		if err := os.Mkdir(tmp+"/"+sub, 0o700); err != nil {
			return nil, err
		}
	}
	must := []string{}
	if userxattr {
		must = append(must, "userxattr")
	}
	// index and redirect_dir would tie layers to the mount they were made in,
	// and metacopy would leave files without content in them; layers are put
	// together anew, so they must be off whatever the kernel's default is.
	// "off" still follows redirects where the kernel was built so, and a step that
	// is allowed everything can leave one in a layer that was written on nothing.
	wanted := []string{"volatile", "index=off", "redirect_dir=nofollow", "metacopy=off"}
	layers := []string{"lowerdir=" + tmp + "/lower", "upperdir=" + tmp + "/upper", "workdir=" + tmp + "/work"}
	try := func(options []string) error {
		if err := os.RemoveAll(tmp + "/work/work"); err != nil {
			return err
		}
		v, err := Open([]mount.Mount{{Type: "overlay", Source: "overlay", Options: slices.Concat(layers, must, options)}})
		if err != nil {
			return err
		}
		return v.Close()
	}
	if try(wanted) == nil {
		return slices.Concat(must, wanted), nil
	}
	if err := try(nil); err != nil {
		return nil, fmt.Errorf("overlay can't be mounted on %s: %w; it must be on a file system that overlay writes to, such as ext4, xfs, btrfs or tmpfs, and not overlay itself or NFS: name a directory on another one with --root", dir, err)
	}
	have := must
	for _, opt := range wanted {
		if try([]string{opt}) == nil {
			have = append(have, opt)
		}
	}
	return have, nil
}
