package build

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"

	"github.com/kilnbuild/kiln/snapshot"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/patternmatcher"
	"github.com/tonistiigi/fsutil"
	fstypes "github.com/tonistiigi/fsutil/types"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// maxFile bounds what one ReadFile answers: a message must fit in the
// connection's limit.
const maxFile = 16<<20 - 4096

// ReadFile reads name, or the range of it, inside the ref (GW-032).
func (r *ref) ReadFile(ctx context.Context, name string, rng *gwpb.FileRange) ([]byte, error) {
	v, err := r.view(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	return tree{v: v}.readFile(name, rng)
}

// ReadDir lists the directory name inside the ref, sorted (GW-033).
func (r *ref) ReadDir(ctx context.Context, name, include string) ([]*fstypes.Stat, error) {
	v, err := r.view(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	return tree{v: v}.readDir(name, include)
}

// StatFile describes name inside the ref; links, also as the last element, are
// followed inside the root (GW-034).
func (r *ref) StatFile(ctx context.Context, name string) (*fstypes.Stat, error) {
	v, err := r.view(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	return tree{v: v}.statFile(name)
}

// tree is what clients may look at: files below a path in a view. No name leads
// out of the view.
type tree struct {
	v     *snapshot.View
	below string
}

func (t tree) path(name string) string {
	if t.below == "" {
		return name
	}
	return path.Join("/", t.below, path.Clean("/"+name))
}

// readFile opens regular files only: opening a device that an image holds could
// do anything.
func (t tree) readFile(name string, rng *gwpb.FileRange) ([]byte, error) {
	found, err := t.v.Resolve(t.path(name))
	if err != nil {
		return nil, pathError("open", name, err)
	}
	defer found.Close()
	st, err := found.Stat()
	if err != nil {
		return nil, pathError("stat", name, err)
	}
	if !st.Mode().IsRegular() {
		return nil, status.Errorf(codes.InvalidArgument, "read %s: not a regular file but %s", name, st.Mode())
	}
	off, n, err := fileRange(name, rng, st.Size())
	if err != nil {
		return nil, err
	}
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", found.Fd()))
	if err != nil {
		return nil, pathError("open", name, err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.NewSectionReader(f, off, n))
	if err != nil {
		return nil, pathError("read", name, err)
	}
	return data, nil
}

// fileRange is what rng takes of a file of the given size; nil is all of it.
func fileRange(name string, rng *gwpb.FileRange, size int64) (off, n int64, err error) {
	n = size
	if rng != nil {
		if rng.Offset < 0 || rng.Length < 0 {
			return 0, 0, status.Errorf(codes.InvalidArgument, "read %s: range of %d bytes from %d is negative", name, rng.Length, rng.Offset)
		}
		off = min(rng.Offset, size)
		n = min(size-off, rng.Length)
	}
	if n > maxFile {
		return 0, 0, status.Errorf(codes.ResourceExhausted, "read %s: %d bytes don't fit in one message; ask for ranges of at most %d", name, n, maxFile)
	}
	return off, n, nil
}

func (t tree) readDir(name, include string) ([]*fstypes.Stat, error) {
	dir, err := t.v.OpenFile(t.path(name), unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, pathError("open", name, err)
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, pathError("read", name, err)
	}
	slices.Sort(names)
	var out []*fstypes.Stat
	for _, base := range names {
		if include != "" {
			ok, err := patternmatcher.MatchesOrParentMatches(base, []string{include})
			if err != nil {
				return nil, status.Errorf(codes.InvalidArgument, "include pattern %q: %v", include, err)
			}
			if !ok {
				continue
			}
		}
		// By the descriptor: the directory's name means another one outside.
		st, err := fsutil.Stat(fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), base))
		if err != nil {
			return nil, pathError("stat", path.Join(name, base), err)
		}
		out = append(out, st)
	}
	return out, nil
}

func (t tree) statFile(name string) (*fstypes.Stat, error) {
	f, err := t.v.Resolve(t.path(name))
	if err != nil {
		return nil, pathError("stat", name, err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, pathError("stat", name, err)
	}
	st := &fstypes.Stat{Path: path.Base(path.Clean("/" + name)), Mode: uint32(fi.Mode() &^ fs.ModeSocket), ModTime: fi.ModTime().UnixNano()}
	if !fi.IsDir() {
		st.Size = fi.Size()
	}
	if sys, ok := fi.Sys().(*syscall.Stat_t); ok {
		st.Uid, st.Gid = sys.Uid, sys.Gid
		st.Devmajor, st.Devminor = int64(unix.Major(sys.Rdev)), int64(unix.Minor(sys.Rdev))
	}
	return st, nil
}

// pathError names the file as the client does, without the daemon's own paths.
func pathError(op, name string, err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	return &fs.PathError{Op: op, Path: "/" + strings.TrimPrefix(name, "/"), Err: err}
}
