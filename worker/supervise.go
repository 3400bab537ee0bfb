package worker

import (
	"path/filepath"

	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/executor/network"
	"github.com/kilnbuild/kiln/executor/supervisor"
	"github.com/kilnbuild/kiln/internal/cleanup"
	"github.com/kilnbuild/kiln/ops"
)

func (w *Worker) executorConfig() executor.Config {
	return executor.Config{
		Root: filepath.Join(w.cfg.Root, "executor"), Binary: w.cfg.Runtime, CgroupParent: w.cfg.CgroupParent, DNS: w.cfg.DNS,
		Network: w.cfg.Network, Log: w.cfg.Log,
	}
}

// outlivingConfig is that of the executors of supervisors. A bridge, and what
// CNI plugins hand out, has one owner, which is the daemon.
func (w *Worker) outlivingConfig() executor.Config {
	cfg := w.executorConfig()
	if !w.sharesNetwork() {
		cfg.Network = network.Config{Mode: network.None}
	}
	return cfg
}

// sharesNetwork says whether steps have the machine's network by default.
func (w *Worker) sharesNetwork() bool {
	return w.cfg.Network.Mode == "" || w.cfg.Network.Mode == network.Host
}

// supervisors is where supervisors have their directories.
func (w *Worker) supervisors() string { return filepath.Join(w.cfg.Root, "supervisors") }

// supervise starts the supervisor, if there is to be one.
func (w *Worker) supervise(undo *cleanup.Stack) {
	if len(w.cfg.Supervisor) == 0 || w.cfg.Unclaimed == 0 {
		return
	}
	w.supervisor = supervisor.New(supervisor.Config{
		Dir: w.supervisors(), Command: w.cfg.Supervisor, Executor: w.outlivingConfig(), Unclaimed: w.cfg.Unclaimed, Keep: ops.KeptOutput(), Log: w.cfg.Log,
	})
	undo.Add(w.supervisor.Close)
}

// Leave has steps that may outlive the daemon go on when their builds are
// cancelled from now on.
func (w *Worker) Leave() {
	if w.supervisor != nil {
		w.supervisor.Leave()
		w.loader.Leave()
	}
}
