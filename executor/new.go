package executor

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"sync"

	"github.com/kilnbuild/kiln/executor/cgroup"
	"github.com/kilnbuild/kiln/executor/native"
	"github.com/kilnbuild/kiln/executor/network"
	"github.com/kilnbuild/kiln/internal/rootless"
)

const (
	defaultCgroupParent = "/kiln"
	bundlesDir          = "bundles"
	filesDir            = "files"
	parentsDir          = "cgroup-parents"
	runcStateDir        = "runc"
	networkDir          = "net"
)

// New makes an executor and removes what an earlier one left behind after a
// crash: runtimes, cgroups with their processes, networks, mounts, bundles.
func New(cfg Config) (Executor, error) { return newExecutor(cfg, openSnapshot) }

func newExecutor(cfg Config, open openView) (_ *executor, err error) {
	if err := checkKernel(); err != nil {
		return nil, err
	}
	if cfg.Binary != "" && rootless.Here().Mapped() {
		return nil, fmt.Errorf("runtime %s: a rootless daemon has the built-in runtime only", cfg.Binary)
	}
	if err := cfg.checkConfinement(); err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.CgroupParent == "" {
		cfg.CgroupParent = defaultCgroupParent
	}
	if cfg.Grace == 0 {
		cfg.Grace = DefaultGrace
	}
	if cfg.Root, err = filepath.Abs(cfg.Root); err != nil {
		return nil, fmt.Errorf("executor root: %w", err)
	}
	if err := os.MkdirAll(cfg.Root, 0o711); err != nil {
		return nil, fmt.Errorf("executor root: %w", err)
	}
	e := &executor{cfg: cfg, dns: resolvConfs{dns: cfg.DNS}}
	if e.parents, err = openParentList(filepath.Join(cfg.Root, parentsDir)); err != nil {
		return nil, err
	}
	tree := cfg.Cgroups
	if tree == nil {
		detect := cgroup.Detect
		if rootless.Here().Mapped() {
			detect = cgroup.Delegated
		}
		if tree, err = detect(); err != nil {
			return nil, err
		}
	}
	if err := killStrays(filepath.Join(cfg.Root, runcStateDir)); err != nil {
		return nil, err
	}
	// The root is this executor's alone, so a name made from it is, too.
	sum := sha256.Sum256([]byte(cfg.Root))
	prefix := hex.EncodeToString(sum[:4])
	e.cgroups, err = cgroup.New(cgroup.Config{Tree: tree, Parent: cfg.CgroupParent, Prefix: prefix, Log: cfg.Log}, e.parents.old)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.cgroups.Close())
		}
	}()
	e.parents.forget()
	if err := removeBundles(filepath.Join(cfg.Root, bundlesDir)); err != nil {
		return nil, err
	}
	if e.files, err = newFileStore(filepath.Join(cfg.Root, filesDir)); err != nil {
		return nil, err
	}
	// Whoever was in the network of an earlier run is gone by now.
	if e.nets, err = network.Open(cmp.Or(cfg.Network.Dir, filepath.Join(cfg.Root, networkDir)), cfg.Network, cfg.Log); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, e.nets.Close())
		}
	}()
	e.confinement = confinement{cgroupNS: e.cgroups.IsV2(), machinePIDs: cfg.MachinePIDs, appArmor: cfg.AppArmor}
	if cfg.Binary == "" {
		e.rt, err = newBuiltin(cfg, e.cgroups, e.confinement, open)
	} else {
		e.rt, err = newRunc(cfg, e.cgroups, e.confinement)
	}
	return e, err
}

// checkConfinement refuses what this machine or daemon can't have.
func (cfg *Config) checkConfinement() error {
	if cfg.AppArmor != "" {
		if err := native.CheckAppArmor(); err != nil {
			return fmt.Errorf("AppArmor profile %q of steps (apparmor-profile): %w", cfg.AppArmor, err)
		}
	}
	if cfg.MachinePIDs && !rootless.Here().Mapped() {
		return errors.New("steps among the machine's processes (no-process-sandbox): only a rootless daemon can have them, since they could end and look into the machine's others")
	}
	return nil
}

// parentList remembers on disk the cgroup parents that steps asked for, so
// that leftovers are found there after a crash.
type parentList struct {
	dir string
	old []string

	mu    sync.Mutex // guards known; held while a file is made, once for each parent
	known map[string]bool
}

func openParentList(dir string) (*parentList, error) {
	l := &parentList{dir: dir, known: map[string]bool{}}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read cgroup parents in use: %w", err)
	}
	for _, e := range entries {
		parent, err := url.PathUnescape(e.Name())
		if err != nil {
			return nil, fmt.Errorf("read cgroup parents in use: %w", err)
		}
		l.old = append(l.old, parent)
		l.known[parent] = true
	}
	return l, nil
}

// forget drops the parents of old, in which nothing is left.
func (l *parentList) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, parent := range l.old {
		// One that stays is looked through again next time.
		if os.Remove(filepath.Join(l.dir, url.PathEscape(parent))) == nil {
			delete(l.known, parent)
		}
	}
}

func (l *parentList) add(parent string) error {
	if parent == "" {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.known[parent] {
		return nil
	}
	if err := os.MkdirAll(l.dir, 0o700); err != nil {
		return fmt.Errorf("remember cgroup parent: %w", err)
	}
	if err := os.WriteFile(filepath.Join(l.dir, url.PathEscape(parent)), nil, 0o600); err != nil {
		return fmt.Errorf("remember cgroup parent: %w", err)
	}
	l.known[parent] = true
	return nil
}
