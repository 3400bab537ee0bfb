package snapshot

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/continuity/fs"
)

// layerer is a snapshotter whose layers are directories in overlay's form:
// deletions are whiteouts in them. Apply and WriteDiff work on those without
// mounting what they read or write.
type layerer interface {
	// layer returns id's own layer.
	layer(id string) (layerInfo, error)
	// unpacked notes that the active layer id is what a tar says.
	unpacked(id string, u unpackedLayer)
}

type layerInfo struct {
	dir    string
	parent string
	active bool
	id     string
	since  int64  // when it was committed; 0 if that isn't known
	xattr  string // prefix of overlay's xattrs
}

// unpackedLayer is what unpacking found out about a layer.
type unpackedLayer struct {
	whole   bool // nothing else is in it
	deletes bool // it has no parent and deletes something
	clears  bool // its root directory is opaque
}

var _ layerer = (*Overlay)(nil)

func (o *Overlay) unpacked(id string, u unpackedLayer) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if s := o.snaps[id]; s != nil && !s.Committed {
		s.Deletes = s.Deletes || u.deletes
		s.Clears = s.Clears || u.clears
		if u.whole {
			s.Form = formOwn
		}
	}
}

func (o *Overlay) layer(id string) (layerInfo, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	s, err := o.getLocked(id)
	if err != nil {
		return layerInfo{}, err
	}
	if len(s.Layers) > 0 {
		return layerInfo{}, fmt.Errorf("snapshot %q is a stack and has no layer of its own", id)
	}
	l := layerInfo{dir: o.fsPath(id), parent: s.Parent, active: !s.Committed, id: id, xattr: o.xattr}
	if s.Committed {
		l.since = s.At
	}
	return l, nil
}

// tarBuffers gather tar headers and small files into larger writes and reads.
var tarBuffers = struct{ readers, writers sync.Pool }{
	readers: sync.Pool{New: func() any { return bufio.NewReaderSize(nil, bufferSize) }},
	writers: sync.Pool{New: func() any { return bufio.NewWriterSize(nil, bufferSize) }},
}

// WriteDiff writes snapshot id's own layer (the change against its parent) to
// w as an OCI layer tar: whiteouts for deletions, opaque markers, hard links,
// xattrs, entries sorted by path, so that the same layer gives the same bytes.
//
// The form is containerd's: PAX where needed, no user names, times in whole
// seconds, sockets left out, and directories that are in the layer only because
// of what is below them included, but only if something is.
func WriteDiff(ctx context.Context, s Snapshotter, id string, w io.Writer) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("write the layer of snapshot %s: %w", id, err)
		}
	}()
	ls, ok := s.(layerer)
	if !ok {
		return writeDiffMounted(ctx, s, id, w)
	}
	layer, err := ls.layer(id)
	if err != nil {
		return err
	}
	var parent *View
	if layer.parent != "" {
		if parent, err = openSnapshot(ctx, s, layer.parent); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, parent.Close()) }()
	}
	out := tarBuffers.writers.Get().(*bufio.Writer)
	out.Reset(w)
	defer func() {
		out.Reset(nil)
		tarBuffers.writers.Put(out)
	}()
	if err := writeUpper(ctx, layer, parent, out); err != nil {
		return err
	}
	return out.Flush()
}

// Apply unpacks the uncompressed OCI layer tar r into the active snapshot id.
// Entries can't leave the snapshot, whatever links the tar or a parent holds.
//
// Whatever follows the tar's end in r is read too, so that a digest of r is that
// of all of it. After an error the snapshot holds a part of the layer and should
// be removed.
func Apply(ctx context.Context, s Snapshotter, id string, r io.Reader) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("unpack a layer into snapshot %s: %w", id, err)
		}
	}()
	in := tarBuffers.readers.Get().(*bufio.Reader)
	in.Reset(r)
	defer func() {
		in.Reset(nil)
		tarBuffers.readers.Put(in)
	}()
	if err := apply(ctx, s, id, in); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, &contextReader{ctx, in}); err != nil {
		return fmt.Errorf("read what follows the tar: %w", err)
	}
	return nil
}

func apply(ctx context.Context, s Snapshotter, id string, r io.Reader) (err error) {
	ls, ok := s.(layerer)
	if !ok {
		return applyMounted(ctx, s, id, r)
	}
	layer, err := ls.layer(id)
	if err != nil {
		return err
	}
	if !layer.active {
		return ErrNotActive
	}
	var parent *View
	if layer.parent != "" {
		if parent, err = openSnapshot(ctx, s, layer.parent); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, parent.Close()) }()
	}
	u, err := applyUpper(ctx, layer, parent, r)
	if err == nil {
		ls.unpacked(id, u)
	}
	return err
}

func openSnapshot(ctx context.Context, s Snapshotter, id string) (*View, error) {
	mounts, err := s.Mounts(ctx, id, true)
	if err != nil {
		return nil, err
	}
	return Open(mounts)
}

// writeDiffMounted compares the mounted snapshot with its mounted parent, for
// snapshotters whose layers are not directories.
func writeDiffMounted(ctx context.Context, s Snapshotter, id string, w io.Writer) (err error) {
	info, err := s.Stat(ctx, id)
	if err != nil {
		return err
	}
	var lower *View
	if info.Parent == "" {
		lower, err = Open(nil)
	} else {
		lower, err = openSnapshot(ctx, s, info.Parent)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lower.Close()) }()
	upper, err := openSnapshot(ctx, s, id)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, upper.Close()) }()
	cw := archive.NewChangeWriter(w, upper.Path())
	// Path is a symlink, which Changes would look at as such.
	err = fs.Changes(ctx, lower.Path()+"/.", upper.Path()+"/.", cw.HandleChange)
	return errors.Join(err, cw.Close())
}

// applyMounted unpacks into the mounted snapshot, for snapshotters whose layers
// are not directories.
func applyMounted(ctx context.Context, s Snapshotter, id string, r io.Reader) (err error) {
	info, err := s.Stat(ctx, id)
	if err != nil {
		return err
	}
	if info.Committed {
		return ErrNotActive
	}
	mounts, err := s.Mounts(ctx, id, false)
	if err != nil {
		return err
	}
	v, err := Open(mounts)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, v.Close()) }()
	_, err = archive.Apply(ctx, v.Path(), r)
	return err
}

// contextReader reads until its context ends.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (r *contextReader) Read(p []byte) (int, error) {
	if err := context.Cause(r.ctx); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}
