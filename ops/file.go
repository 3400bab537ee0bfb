package ops

import (
	"context"
	"sync"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
)

// fileOp changes files by a graph of actions (LLB-060). An action takes the
// state of the filesystem that its input names and makes a new one; it may
// read others. States are numbered: the op's inputs first, then the actions.
type fileOp struct {
	vertex
	slots
	op     *pb.FileOp
	inputs int
	cache  *cache.Manager
	plan   filePlan

	readOnce sync.Once // makes read
	read     map[int][]fileSelector
}

// newFileOp makes the op's plan and returns what the solver calls.
func (l *Loader) newFileOp(v vertex, op *pb.FileOp) (solver.Op, error) {
	inputs := len(v.pb.Inputs)
	plan, err := newFilePlan(op, inputs)
	if err != nil {
		return nil, err
	}
	return &fileOp{vertex: v, slots: l.slots, op: op, inputs: inputs, cache: l.cfg.Cache, plan: plan}, nil
}

// Small has a build run a few file ops at a time: thousands that become possible
// at once would each hold memory and be in each other's way.
func (f *fileOp) Small() {}

// CacheMap identifies the op by its actions and, where it only reads inputs, by
// what it reads of them.
func (f *fileOp) CacheMap(context.Context, solver.Asker, int) (*solver.CacheMap, bool, error) {
	m, err := fileCacheMap(f.op, f.inputs)
	if err != nil {
		return nil, false, err
	}
	return m, false, nil
}

// Exec runs the actions that the outputs need.
func (f *fileOp) Exec(ctx context.Context, _ solver.Asker, inputs []solver.Result) ([]solver.Result, error) {
	in, err := refs(inputs)
	if err != nil {
		return nil, err
	}
	var out []*cache.Ref
	if err := f.cache.WithRoom(ctx, func() (err error) {
		out, err = f.run(ctx, in)
		return err
	}); err != nil {
		return nil, err
	}
	results := make([]solver.Result, len(out))
	for i, ref := range out {
		results[i] = Result{ref}
	}
	return results, nil
}

// FileActionError says which action of a file op failed.
type FileActionError struct {
	Index int // into the op's actions
	Err   error
}

func (e *FileActionError) Error() string { return e.Err.Error() }
func (e *FileActionError) Unwrap() error { return e.Err }

// fileActionOwner returns who the action makes the owner, nil if it says nothing.
func fileActionOwner(a *pb.FileAction) *pb.ChownOpt {
	switch x := a.Action.(type) {
	case *pb.FileAction_Mkdir:
		return x.Mkdir.GetOwner()
	case *pb.FileAction_Mkfile:
		return x.Mkfile.GetOwner()
	case *pb.FileAction_Symlink:
		return x.Symlink.GetOwner()
	case *pb.FileAction_Copy:
		return x.Copy.GetOwner()
	}
	return nil
}

// fileActionName is what clients and messages call the action.
func fileActionName(a *pb.FileAction) string {
	switch x := a.GetAction().(type) {
	case *pb.FileAction_Mkdir:
		return "mkdir " + x.Mkdir.Path
	case *pb.FileAction_Mkfile:
		return "mkfile " + x.Mkfile.Path
	case *pb.FileAction_Symlink:
		return "symlink " + x.Symlink.Newpath + " -> " + x.Symlink.Oldpath
	case *pb.FileAction_Rm:
		return "rm " + x.Rm.Path
	case *pb.FileAction_Copy:
		return "copy " + x.Copy.Src + " " + x.Copy.Dest
	}
	return "unknown"
}
