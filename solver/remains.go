package solver

import "errors"

// Remains is an error of Exec that comes with results, for whoever wants to
// look at what a step was doing when it failed: what it was given, and what it
// has left. Their order is the op's affair, and some may be nil.
//
// From Exec they pass to the solver. Each build that the failure is one of finds
// handles of its own in its VertexError, which last until the build's Close.
type Remains struct {
	Err          error
	Inputs, Left []Result
}

func (r *Remains) Error() string { return r.Err.Error() }
func (r *Remains) Unwrap() error { return r.Err }

// Release gives all results back. It may be called on nil.
func (r *Remains) Release() {
	if r == nil {
		return
	}
	for _, list := range [][]Result{r.Inputs, r.Left} {
		for _, res := range list {
			release(res)
		}
	}
}

// clone is err with handles of its own.
func (r *Remains) clone(err error) *Remains {
	return &Remains{Err: err, Inputs: cloneAll(r.Inputs), Left: cloneAll(r.Left)}
}

func cloneAll(list []Result) []Result {
	out := make([]Result, len(list))
	for i, r := range list {
		if r != nil {
			out[i] = r.Clone()
		}
	}
	return out
}

// remain gives this build handles of its own on what a failed flight left.
func (b *Build) remain(f *flight) error {
	if f.left == nil {
		return f.err
	}
	own := f.left.clone(f.err)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.remains = append(b.remains, own)
	return own
}

// ReleaseRemains releases what comes with err, for callers of Exec that have no
// use for it.
func ReleaseRemains(err error) {
	var r *Remains
	if errors.As(err, &r) {
		r.Release()
	}
}
