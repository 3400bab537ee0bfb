package supervisor

import (
	"context"
	"sync"
	"time"
)

// step is one run.
//
//	attached <--> detached     a daemon follows it or not
//	running   --> ended        exit is set
//
// It is forgotten when a daemon has taken its exit, or nobody has in time.
type step struct {
	Step
	srv    *server
	cancel context.CancelCauseFunc

	mu    sync.Mutex // guards the fields below; held while something is sent, so that all is sent in order
	conn  *conn      // of the daemon that is attached; nil for none
	log   keptLog
	exit  *exit
	lapse *time.Timer // ends it, while it is detached
}

// stream is what a process prints to.
type stream struct {
	st *step
	n  int
}

// Write never fails: a step doesn't notice that its daemon has gone.
func (s stream) Write(p []byte) (int, error) {
	st := s.st
	st.mu.Lock()
	defer st.mu.Unlock()
	st.log.add(s.n, p)
	st.sendLocked(reply{Stream: s.n, Data: p})
	return len(p), nil
}

// sendLocked sends r to the daemon, if there is one.
func (st *step) sendLocked(r reply) {
	if st.conn != nil && st.conn.send(r) != nil {
		st.detachLocked()
	}
}

// attach has c follow the step from its start, instead of whoever did.
func (st *step) attach(c *conn) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.lapse != nil {
		st.lapse.Stop()
		st.lapse = nil
	}
	st.conn = c
	err := st.log.replay(func(stream int, p []byte) error { return c.send(reply{Stream: stream, Data: p}) })
	if err == nil && st.exit != nil {
		err = c.send(reply{Exit: st.exit})
	}
	if err != nil {
		st.srv.log.Warn("send a step to the daemon", "step", st.ID, "error", err)
		st.detachLocked()
	}
}

// detach is called when c has ended.
func (st *step) detach(c *conn) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.conn == c {
		st.detachLocked()
	}
}

func (st *step) detachLocked() {
	st.conn = nil
	if st.lapse == nil {
		st.srv.log.Info("no daemon follows the step", "step", st.ID, "ends in", st.srv.cfg.Unclaimed)
		st.lapse = time.AfterFunc(st.srv.cfg.Unclaimed, st.abandon)
	}
}

// abandon ends a step that nobody has asked for.
func (st *step) abandon() {
	st.mu.Lock()
	attached, ended := st.conn != nil, st.exit != nil
	st.mu.Unlock()
	switch {
	case attached:
	case ended:
		st.srv.forget(st)
	default:
		st.srv.log.Warn("ending a step that no daemon has asked for", "step", st.ID)
		st.cancel(ErrUnclaimed)
	}
}

// close is called when the step is forgotten.
func (st *step) close() error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.lapse != nil {
		st.lapse.Stop()
	}
	return st.log.close()
}

// ended is called with what the run came to.
func (st *step) ended(x *exit) {
	st.mu.Lock()
	st.exit = x
	st.sendLocked(reply{Exit: x})
	forgotten := x.Unknown && st.conn == nil
	st.mu.Unlock()
	if forgotten {
		st.srv.forget(st)
	}
}
