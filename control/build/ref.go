package build

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync"
	"syscall"

	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/kilnbuild/kiln/solver"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/patternmatcher"
	fstypes "github.com/tonistiigi/fsutil/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ref is a lazy reference to one edge of the build's graph.
type ref struct {
	br   *bridge
	def  *pb.Definition
	edge solver.Edge

	mu     sync.Mutex // guards result; not held while solving
	result *ops.Result
}

// Definition is what the ref stands for.
func (r *ref) Definition() *pb.Definition { return r.def }

// Evaluate solves the ref.
func (r *ref) Evaluate(ctx context.Context) error {
	_, err := r.solve(ctx)
	return err
}

// solve returns the result, which the bridge holds until the build ends.
// Concurrent calls are one solve in the build's graph.
func (r *ref) solve(ctx context.Context) (ops.Result, error) {
	r.mu.Lock()
	known := r.result
	r.mu.Unlock()
	if known != nil {
		return *known, nil
	}
	res, err := r.br.b.solver.Solve(ctx, r.edge)
	if err != nil {
		return ops.Result{}, located(err, r.def)
	}
	out, ok := res.(ops.Result)
	if !ok {
		res.Release()
		return ops.Result{}, fmt.Errorf("internal error: a result of type %T is not a reference", res)
	}
	if err := r.br.hold(out); err != nil {
		return ops.Result{}, err
	}
	r.mu.Lock()
	r.result = &out
	r.mu.Unlock()
	return out, nil
}

// view solves the ref and opens what it stands for.
func (r *ref) view(ctx context.Context) (*snapshot.View, error) {
	res, err := r.solve(ctx)
	if err != nil {
		return nil, err
	}
	return res.Ref.Open(ctx)
}

// maxFile bounds what one ReadFile answers: a message must fit in the
// connection's limit.
const maxFile = 16<<20 - 4096

// ReadFile reads name, or the range of it, inside the ref.
func (r *ref) ReadFile(ctx context.Context, name string, rng *gwpb.FileRange) ([]byte, error) {
	v, err := r.view(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	f, err := openIn(v, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, pathError("stat", name, err)
	}
	if !st.Mode().IsRegular() {
		return nil, status.Errorf(codes.InvalidArgument, "read %s: not a regular file but %s", name, st.Mode().Type())
	}
	off, n := int64(0), st.Size()
	if rng != nil {
		if rng.Offset < 0 || rng.Length < 0 {
			return nil, status.Errorf(codes.InvalidArgument, "read %s: range %d+%d is negative", name, rng.Offset, rng.Length)
		}
		off = min(rng.Offset, n)
		if n -= off; rng.Length > 0 {
			n = min(n, rng.Length)
		}
	}
	if n > maxFile {
		return nil, status.Errorf(codes.ResourceExhausted, "read %s: %d bytes don't fit in one message; ask for ranges of at most %d", name, n, maxFile)
	}
	data, err := io.ReadAll(io.NewSectionReader(f, off, n))
	if err != nil {
		return nil, pathError("read", name, err)
	}
	return data, nil
}

// ReadDir lists the directory name inside the ref.
func (r *ref) ReadDir(ctx context.Context, name, include string) ([]*fstypes.Stat, error) {
	v, err := r.view(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	dir, err := openIn(v, name)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	entries, err := dir.ReadDir(-1)
	if err != nil {
		return nil, pathError("read", name, err)
	}
	var out []*fstypes.Stat
	for _, e := range entries {
		if include != "" {
			ok, err := patternmatcher.MatchesOrParentMatches(e.Name(), []string{include})
			if err != nil {
				return nil, status.Errorf(codes.InvalidArgument, "include pattern %q: %v", include, err)
			}
			if !ok {
				continue
			}
		}
		fi, err := e.Info()
		if err != nil {
			return nil, pathError("stat", path.Join(name, e.Name()), err)
		}
		st := statOf(e.Name(), fi)
		if fi.Mode()&fs.ModeSymlink != 0 {
			if st.Linkname, err = readlinkAt(dir, e.Name()); err != nil {
				return nil, pathError("readlink", path.Join(name, e.Name()), err)
			}
		}
		out = append(out, st)
	}
	return out, nil
}

// StatFile describes name inside the ref. Links on the way are followed inside
// the root; the last element is not.
func (r *ref) StatFile(ctx context.Context, name string) (*fstypes.Stat, error) {
	v, err := r.view(ctx)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	dir, base := path.Split(path.Clean("/" + name))
	parent, err := openIn(v, dir)
	if err != nil {
		return nil, err
	}
	defer parent.Close()
	if base == "" {
		fi, err := parent.Stat()
		if err != nil {
			return nil, pathError("stat", name, err)
		}
		return statOf("/", fi), nil
	}
	fi, err := os.Lstat(fmt.Sprintf("/proc/self/fd/%d/%s", parent.Fd(), base))
	if err != nil {
		return nil, pathError("stat", name, err)
	}
	st := statOf(base, fi)
	if fi.Mode()&fs.ModeSymlink != 0 {
		if st.Linkname, err = readlinkAt(parent, base); err != nil {
			return nil, pathError("readlink", name, err)
		}
	}
	return st, nil
}

func readlinkAt(dir *os.File, name string) (string, error) {
	return os.Readlink(fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), name))
}

// pathError names the file as the client does, without the daemon's own paths.
func pathError(op, name string, err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	return &fs.PathError{Op: op, Path: "/" + strings.TrimPrefix(name, "/"), Err: err}
}

func statOf(name string, fi fs.FileInfo) *fstypes.Stat {
	st := &fstypes.Stat{Path: name, Mode: uint32(fi.Mode()), Size: fi.Size(), ModTime: fi.ModTime().UnixNano()}
	if sys, ok := fi.Sys().(*syscall.Stat_t); ok {
		st.Uid, st.Gid = sys.Uid, sys.Gid
	}
	return st
}
