package supervisor

import (
	"context"
	"os"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/internal/steplog"
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

	log  *steplog.Writer
	over chan struct{} // closed when exit is set

	mu      sync.Mutex // guards the fields below; never held while something is sent
	changed sync.Cond  // on mu: there is something to tell, or somebody else to tell it
	conn    *conn      // of the daemon that is attached; nil for none
	exit    *exit
	lapse   *time.Timer // ends it, while it is detached
}

// printed is called when the log has grown.
func (st *step) printed() {
	st.mu.Lock() // so that tell doesn't miss it
	defer st.mu.Unlock()
	st.changed.Broadcast()
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
	st.changed.Broadcast()
}

// tellInterval is the least time between two messages about the log, so that a
// chatty step costs few of them. The end isn't held up.
const tellInterval = 5 * time.Millisecond

// tell sends c how long the log is, whenever it has grown, and how the step has
// ended, as long as c is attached. It is the only one who waits for the daemon: the
// step doesn't.
func (st *step) tell(c *conn) {
	var told int64
	var parts int // whose files were sent
	for {
		r, ok := st.news(c, told)
		if !ok {
			return
		}
		var files []*os.File
		if r.Log != nil {
			files = r.Log.Files()[parts:]
			told, parts = r.Log.Size, len(r.Log.Parts)
		}
		if c.send(r, files...) != nil {
			st.detach(c)
			return
		}
		if r.Exit != nil {
			return
		}
		timer := time.NewTimer(tellInterval)
		select {
		case <-timer.C:
		case <-st.over:
			timer.Stop()
		}
	}
}

// news waits for something to tell c, which knows the log up to told. It is false
// when c isn't attached any more.
func (st *step) news(c *conn, told int64) (r reply, ok bool) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for st.conn == c {
		if x := st.log.Extent(); x.Size > told || x.Lost != "" && st.exit != nil {
			r.Log = &x
		}
		if r.Exit = st.exit; r.Exit != nil || r.Log != nil {
			return r, true
		}
		st.changed.Wait()
	}
	return r, false
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
	st.changed.Broadcast()
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
	return st.log.Close()
}

// ended is called with what the run came to.
func (st *step) ended(x *exit) {
	st.mu.Lock()
	st.exit = x
	close(st.over)
	st.changed.Broadcast()
	forgotten := x.Unknown && st.conn == nil
	st.mu.Unlock()
	if forgotten {
		st.srv.forget(st)
	}
}
