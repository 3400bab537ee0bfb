package ops

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/executor/supervisor"
	"github.com/kilnbuild/kiln/internal/cleanup"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/internal/steplog"
	"github.com/kilnbuild/kiln/solver"
)

// Supervisor runs processes that outlive the daemon.
type Supervisor interface {
	// Expect says that Run will be called soon, and doesn't wait.
	Expect()
	// Run is executor.Run of a process whose output is stored; printed is called
	// when it has grown. The note is for the next daemon, should this one not
	// call done, which it does when what the process made is safe. The error is
	// supervisor.ErrLeft if the process goes on though ctx has ended.
	Run(ctx context.Context, p executor.Process, note []byte, printed func(steplog.Extent)) (_ executor.Usage, done func(), err error)
}

// outlives reports whether the step may go on when the daemon ends. What comes
// from a session doesn't: the agent behind an SSH socket is gone, and of secrets
// nobody could tell later whether who asks again has the same.
func (e *execOp) outlives() bool {
	cfg := e.loader.cfg
	return cfg.Supervisor != nil && len(e.wantedSecrets()) == 0 && !e.usesSSH()
}

// identity names this execution so that the next daemon can tell that it is
// asked for the same; "" if it can't outlive this one.
func (e *execOp) identity(asker solver.Asker) (string, error) {
	named, ok := asker.(interface{ Identity() string })
	if !ok || !e.outlives() {
		return "", nil
	}
	dt, err := json.Marshal([]any{named.Identity(), e.op, e.resources, e.limits})
	if err != nil {
		return "", fmt.Errorf("encode op for its identity: %w", err)
	}
	sum := sha256.Sum256(dt)
	return hex.EncodeToString(sum[:]), nil
}

// stepNote is what the next daemon must know to go on with a step.
type stepNote struct {
	Identity string
	Layers   []noteLayer
	Caches   []noteCache
}

// noteLayer is a mountLayer: a record that is written, or one that is read.
type noteLayer struct {
	Mount   int
	Written *cache.Interrupted `json:",omitempty"`
	Ref     string             `json:",omitempty"`
}

// noteCache is a cacheDir.
type noteCache struct {
	Record, Key, ID string
	Shared          bool
}

func (s *step) note() ([]byte, error) {
	n := stepNote{Identity: s.identity}
	for _, l := range s.layers {
		nl := noteLayer{Mount: l.index}
		switch {
		case l.mutable != nil:
			i := l.mutable.Interrupted()
			nl.Written = &i
		case l.ref != nil:
			nl.Ref = l.ref.ID()
		}
		n.Layers = append(n.Layers, nl)
	}
	for _, d := range s.caches {
		n.Caches = append(n.Caches, noteCache{Record: d.mutable.ID(), Key: d.key.name, ID: d.key.id, Shared: d.shared})
	}
	dt, err := json.Marshal(n)
	if err != nil {
		return nil, fmt.Errorf("encode what the next daemon must know of a step: %w", err)
	}
	return dt, nil
}

// execute runs p, where it belongs, and calls printed when its log has grown.
func (s *step) execute(ctx context.Context, p executor.Process, printed func(steplog.Extent)) (err error) {
	if s.identity == "" {
		var log *steplog.Writer
		log = steplog.NewWriter(s.loader.cfg.Logs, func() { printed(log.Extent()) })
		defer func() { err = errors.Join(err, log.Close()) }()
		p.Stdout, p.Stderr = log.Stream(streamStdout), log.Stream(streamStderr)
		_, err = s.loader.cfg.Executor.Run(ctx, p)
		return err
	}
	note, err := s.note()
	if err != nil {
		return err
	}
	_, s.done, err = s.loader.cfg.Supervisor.Run(ctx, p, note, printed)
	if errors.Is(err, supervisor.ErrLeft) {
		err = errors.Join(err, s.leave(ctx))
	}
	return err
}

// leave gives back what the step holds, but for what its process goes on to
// write to.
func (s *mountSet) leave(ctx context.Context) error {
	var errs []error
	for _, l := range s.layers {
		if l.mutable != nil {
			errs = append(errs, l.mutable.Leave(context.WithoutCancel(ctx)))
		} else {
			l.ref.Release()
		}
	}
	s.layers = nil
	return errors.Join(errs...)
}

// safe is called when what the step made is.
func (s *step) safe() {
	if s.done != nil {
		s.done()
	}
}

// resume goes on with the same step that an earlier daemon has left, if there is
// one.
func (s *step) resume(ctx context.Context) (resumed bool, err error) {
	i := s.loader.interrupted.claim(s.identity)
	if i == nil {
		return false, nil
	}
	s.loader.cfg.Log.Info("going on with a step of an earlier daemon", "step", i.ID, "command", s.user, "started", i.Started)
	s.layers, s.undo = i.layers, i.undo
	view := newLogView(progress.From(ctx), s.loader.logs, i.Started)
	defer view.close() //nolint:errcheck // it was read only
	_, s.done, err = i.from.Attach(ctx, i.ID, view.follow)
	if errors.Is(err, supervisor.ErrLeft) { // once more
		return true, errors.Join(s.failure(ctx, err), s.leave(ctx))
	}
	if errors.Is(err, supervisor.ErrUnclaimed) && ctx.Err() == nil {
		err := s.mountSet.close(ctx) // it was too late, and runs anew
		s.undo = cleanup.Stack{}
		return false, err
	}
	if err != nil {
		view.flush()
		return true, s.failure(ctx, err)
	}
	return true, nil
}
