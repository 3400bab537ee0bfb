package worker

import (
	"path/filepath"

	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/executor/supervisor"
	"github.com/kilnbuild/kiln/internal/cleanup"
)

// executorConfig is that of the daemon's executor and of its supervisor's, which
// share their network.
func (w *Worker) executorConfig() executor.Config {
	return executor.Config{
		Root: filepath.Join(w.cfg.Root, "executor"), Binary: w.cfg.Runtime, CgroupParent: w.cfg.CgroupParent, DNS: w.cfg.DNS,
		AppArmor: w.cfg.AppArmor, Most: w.cfg.Most, MachinePIDs: w.cfg.MachinePIDs, Network: w.cfg.Network, Grace: w.cfg.CancelGrace, Log: w.cfg.Log,
	}
}

// supervisors is where supervisors have their directories.
func (w *Worker) supervisors() string { return supervisorsIn(w.cfg.Root) }

func supervisorsIn(root string) string { return filepath.Join(root, "supervisors") }

// Supervisors are the processes of earlier daemons' supervisors that live.
func Supervisors(root string) []int { return supervisor.Pids(supervisorsIn(root)) }

// ownExecutor is the daemon's. Where there is a supervisor, few steps run in it:
// those with secrets or SSH agents, frontends, and containers of clients.
func (w *Worker) ownExecutor() executor.Config {
	cfg := w.executorConfig()
	cfg.Network.Few = w.supervised()
	return cfg
}

// supervised reports whether steps may outlive the daemon.
func (w *Worker) supervised() bool { return len(w.cfg.Supervisor) > 0 && w.cfg.Unclaimed != 0 }

// supervise has the supervisor started when it is needed, if there is to be one.
func (w *Worker) supervise(undo *cleanup.Stack) {
	if !w.supervised() {
		return
	}
	w.supervisor = supervisor.New(supervisor.Config{
		Dir: w.supervisors(), Command: w.cfg.Supervisor, Executor: w.executorConfig(), Unclaimed: w.cfg.Unclaimed, Log: w.cfg.Log,
	})
	undo.Add(w.supervisor.Close)
}

// Leave has steps that may outlive the daemon go on when their builds are
// cancelled from now on.
func (w *Worker) Leave() {
	if w.supervisor == nil {
		return
	}
	w.supervisor.Leave()
	w.loader.Leave()
	for _, e := range w.earlier { // and what they have gone on with
		e.Leave()
	}
}
