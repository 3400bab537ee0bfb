package snapshot

import (
	"slices"
	"strconv"
	"strings"
	"sync"
)

// shareTable knows the writable overlays that views have open, by their upper
// directory. Two mounts of one would each believe to be alone.
type shareTable struct {
	mu sync.Mutex // guards m and the counts in it
	m  map[string]*share
}

type share struct {
	users int // who has it, or waits for it

	mu     sync.Mutex // guards the fields below; held while mounting, so that others wait
	refs   int
	origin *origin
}

var shares = shareTable{m: map[string]*share{}}

// acquire returns the mount of upper, which mount makes if there is none.
func (t *shareTable) acquire(upper string, mount func() (*origin, error)) (*origin, error) {
	s := t.enter(upper)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refs == 0 {
		o, err := mount()
		if err != nil {
			t.leave(upper, s)
			return nil, err
		}
		s.origin = o
	}
	s.refs++
	return &origin{fd: s.origin.fd, close: func() error { return t.release(upper, s) }}, nil
}

// unlessMounted calls fn if upper isn't mounted, and keeps it so meanwhile.
func (t *shareTable) unlessMounted(upper string, fn func() error) error {
	s := t.enter(upper)
	defer t.leave(upper, s)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refs > 0 {
		return nil
	}
	return fn()
}

// enter returns the entry of upper, which stays until leave.
func (t *shareTable) enter(upper string) *share {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.m[upper]
	if s == nil {
		s = &share{}
		t.m[upper] = s
	}
	s.users++
	return s
}

// release gives a reference back.
func (t *shareTable) release(upper string, s *share) (err error) {
	defer t.leave(upper, s)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.refs--; s.refs == 0 {
		err = s.origin.close()
		s.origin = nil
	}
	return err
}

func (t *shareTable) leave(upper string, s *share) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s.users--; s.users == 0 {
		delete(t.m, upper)
	}
}

// viewTable knows the open views by descriptor, for kernels that can't clone a
// detached mount when another mount's source is in it.
type viewTable struct {
	mu sync.Mutex // guards m
	m  map[int][]*View
}

var views = viewTable{m: map[int][]*View{}}

func (t *viewTable) add(v *View) {
	if features().clones {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.m[v.fd] = append(t.m[v.fd], v)
}

func (t *viewTable) remove(v *View) {
	t.mu.Lock()
	defer t.mu.Unlock()
	rest := slices.DeleteFunc(t.m[v.fd], func(o *View) bool { return o == v })
	if t.m[v.fd] = rest; len(rest) == 0 {
		delete(t.m, v.fd)
	}
}

// originOf finds the view that the path *source is in. For a view of a bind
// mount it replaces the path by that in the bind's own source; for any other it
// returns the view's origin and the path in it.
func (t *viewTable) originOf(source *string) (o *origin, rest string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for {
		after, ok := strings.CutPrefix(*source, "/proc/self/fd/")
		if !ok {
			return nil, ""
		}
		name, rest, _ := strings.Cut(after, "/")
		fd, err := strconv.Atoi(name)
		if err != nil || t.m[fd] == nil {
			return nil, ""
		}
		v := t.m[fd][0] // they all show the same
		if v.source == "" {
			return v.origin, "/" + rest
		}
		*source = strings.TrimSuffix(v.source+"/"+rest, "/")
	}
}
