package llb

import (
	"errors"
	"path"
	"strings"

	"github.com/moby/buildkit/solver/pb"
)

// file is the vertex of a chain of file actions.
type file struct {
	chain       *boundAction
	constraints Constraints
}

// File changes files of s. The actions of a chain become one operation.
func (s State) File(a *FileAction, opts ...ConstraintsOpt) State {
	v := &file{chain: a.bind(s), constraints: newConstraints(opts)}
	return s.withOutput(&output{vertex: v})
}

// boundAction is an action with the state that its chain changes. It has an
// identity: an action that is the source of two copies is done once.
type boundAction struct {
	*FileAction
	prev  *boundAction
	state State
}

func (a *FileAction) bind(s State) *boundAction {
	if a == nil {
		return nil
	}
	return &boundAction{FileAction: a, prev: a.prev.bind(s), state: s}
}

func (v *file) marshal(m *marshaller) (*pb.Op, Constraints, error) {
	if v.chain == nil {
		return nil, Constraints{}, errors.New("a file operation needs an action")
	}
	w := fileWriter{m: m, op: &pb.Op{}, body: &pb.FileOp{}, c: v.constraints.clone(), index: map[*boundAction]int{}}
	w.c.need(pb.CapFileBase)
	last, err := w.add(v.chain)
	if err != nil {
		return nil, Constraints{}, err
	}
	w.body.Actions[last].Output = 0
	// Inputs are complete only now: actions are numbered after them.
	for _, fix := range w.later {
		fix(int64(len(w.op.Inputs)))
	}
	w.op.Op = &pb.Op_File{File: w.body}
	return w.op, w.c, nil
}

// fileWriter writes one file op.
type fileWriter struct {
	m     *marshaller
	op    *pb.Op
	body  *pb.FileOp
	c     Constraints
	index map[*boundAction]int
	later []func(inputs int64)
}

// add writes a after the actions it needs and returns its index.
func (w *fileWriter) add(a *boundAction) (int, error) {
	if i, ok := w.index[a]; ok {
		return i, nil
	}
	fa := &pb.FileAction{SecondaryInput: int64(pb.Empty), Output: int64(pb.SkipOutput)}
	if a.prev != nil {
		i, err := w.add(a.prev)
		if err != nil {
			return 0, err
		}
		w.refer(&fa.Input, i)
	}
	base, err := w.m.addInput(w.op, a.state.out)
	if err != nil {
		return 0, err
	}
	if a.prev == nil {
		fa.Input = base
	}
	if err := a.action.write(w, fa, a.state.dir, base); err != nil {
		return 0, err
	}
	i := len(w.body.Actions)
	w.body.Actions = append(w.body.Actions, fa)
	w.index[a] = i
	return i, nil
}

// refer makes field point to the i-th action.
func (w *fileWriter) refer(field *int64, i int) {
	w.later = append(w.later, func(inputs int64) { *field = inputs + int64(i) })
}

// joinPath makes p absolute in dir. With keepSlash, an end of "/" or "/." stays.
func joinPath(dir, p string, keepSlash bool) string {
	out := path.Clean(p)
	if !path.IsAbs(out) {
		out = path.Join("/", dir, out)
	}
	switch {
	case !keepSlash:
	case strings.HasSuffix(p, "/") && !strings.HasSuffix(out, "/"):
		out += "/"
	case strings.HasSuffix(p, "/."):
		out = strings.TrimSuffix(out, "/") + "/."
	}
	return out
}
