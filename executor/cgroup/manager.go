package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/kilnbuild/kiln/internal/cleanup"
	"golang.org/x/sys/unix"
)

// ahead is how many groups are made before they are needed.
const ahead = 4

// Manager makes groups. All methods are safe for concurrent use.
type Manager struct {
	tree    *Tree
	parent  string // default parent, such as "/kiln"
	prefix  string // of all names this manager makes
	devices dir    // v1: the group that confines devices, shared by all
	filter  int    // v2: device program
	log     *slog.Logger
	mkdir   func(string, fs.FileMode) error // os.Mkdir, but in tests

	mu      sync.Mutex        // guards the fields below; never held across I/O
	parents map[string]string // made so far, with the mount point each is below
	adopted map[string]string // the same of parents that others make

	ready   chan *Group // made ahead
	removed chan *Group // to be removed
	stop    context.CancelFunc
	filler  sync.WaitGroup
	remover sync.WaitGroup
}

// Config is what a Manager is made from.
type Config struct {
	Tree   *Tree
	Parent string // default parent path
	Prefix string // of the names of all groups, unique to one daemon
	Log    *slog.Logger
}

// New makes a manager. It keeps its default parent and a group for device
// rules; everything else in it by that prefix is removed first, with its
// processes, and so are leftovers below otherParents.
func New(cfg Config, otherParents []string) (_ *Manager, err error) {
	m := &Manager{
		tree: cfg.Tree, parent: clean(cfg.Parent), prefix: cfg.Prefix, log: cfg.Log, filter: -1, mkdir: os.Mkdir,
		parents: map[string]string{}, adopted: map[string]string{}, ready: make(chan *Group, ahead), removed: make(chan *Group, 256),
	}
	if m.tree.Unprivileged && m.tree.V2 != "" {
		// Where no controller is to be passed on nothing would, and the next daemon
		// would not find itself alone.
		if err := moveToInit(m.tree.V2); err != nil {
			return nil, err
		}
	}
	for _, parent := range append([]string{m.parent}, otherParents...) {
		m.adopt(clean(parent))
		if err := m.sweep(clean(parent)); err != nil {
			return nil, err
		}
	}
	if err := m.confineDevices(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	m.stop = cancel
	m.filler.Go(func() { m.fill(ctx) })
	m.remover.Go(m.removeLoop)
	return m, nil
}

// Close removes all groups. It waits for removals under way.
func (m *Manager) Close() error {
	m.stop()
	m.filler.Wait()
	close(m.ready)
	for g := range m.ready {
		m.removed <- g
	}
	close(m.removed)
	m.remover.Wait()
	var errs []error
	if m.filter >= 0 {
		errs = append(errs, unix.Close(m.filter))
	}
	if m.devices.path != "" {
		errs = append(errs, unix.Close(m.devices.join), RemoveTree(m.devices.path))
	}
	m.removeParents()
	return errors.Join(errs...)
}

// Leftovers lists the groups that exist now, including those made ahead.
func (m *Manager) Leftovers() []string {
	var list []string
	for _, root := range m.roots(m.parent) {
		found, err := filepath.Glob(filepath.Join(root, m.prefix+"-*"))
		if err != nil {
			panic(fmt.Sprintf("internal error: %v", err)) // of the pattern alone
		}
		list = append(list, found...)
	}
	return list
}

// adopt makes parent one of those to be removed in the end, wherever it may be:
// runtimes and earlier managers make it, too.
func (m *Manager) adopt(parent string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, root := range m.roots("/") {
		full := filepath.Join(root, parent)
		if _, known := m.parents[full]; !known {
			m.adopted[full] = root
		}
	}
}

// removeParents removes parents that nobody uses any more.
func (m *Manager) removeParents() {
	maps.Copy(m.adopted, m.parents)
	for full, root := range m.adopted {
		for path := full; path != filepath.Clean(root); path = filepath.Dir(path) {
			if err := unix.Rmdir(path); err != nil && !errors.Is(err, unix.ENOENT) {
				break // others are in it
			}
		}
	}
}

func clean(parent string) string { return filepath.Join("/", parent) }

// roots are all directories that stand for the path parent.
func (m *Manager) roots(parent string) []string {
	var roots []string
	for _, dir := range m.tree.Bare {
		roots = append(roots, filepath.Join(dir, parent))
	}
	if m.tree.V2 != "" {
		return append(roots, filepath.Join(m.tree.V2, parent))
	}
	for _, h := range m.tree.V1 {
		roots = append(roots, filepath.Join(h.Dir, parent))
	}
	return roots
}

// sweep removes what an earlier manager with the same prefix left in parent.
func (m *Manager) sweep(parent string) error {
	var errs []error
	for _, root := range m.roots(parent) {
		entries, err := os.ReadDir(root)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("sweep cgroups: %w", err)
		}
		for _, e := range entries {
			if e.IsDir() && strings.HasPrefix(e.Name(), m.prefix+"-") {
				errs = append(errs, RemoveTree(filepath.Join(root, e.Name())))
			}
		}
	}
	return errors.Join(errs...)
}

// confineDevices prepares what denies devices to confined processes.
func (m *Manager) confineDevices() (err error) {
	if m.tree.Unprivileged {
		return nil
	}
	if m.tree.V2 != "" {
		m.filter, err = loadDeviceProgram(DefaultDevices)
		return err
	}
	h := m.tree.hierarchy("devices")
	if h == nil {
		return fmt.Errorf("the machine has no cgroup controller for devices, so that steps can't be kept from disks")
	}
	d, err := m.makeDir(h, m.parent, m.prefix+"-devices")
	if err != nil {
		return err
	}
	if err := setDevicesV1(d.path, DefaultDevices); err != nil {
		return errors.Join(err, unix.Close(d.join), RemoveTree(d.path))
	}
	d.shared = true
	m.devices = d
	return nil
}

// IsV2 says whether groups are version 2, so that a cgroup namespace makes
// sense.
func (m *Manager) IsV2() bool { return m.tree.V2 != "" }

// HasGroups says whether processes are in groups at all, so that they can be
// limited and counted.
func (m *Manager) HasGroups() bool { return m.tree.V2 != "" || len(m.tree.V1) > 0 }

// Existing returns the group that spec names, be it there or not. It is not
// released but removed.
func (m *Manager) Existing(spec Spec) *Group {
	parent := m.parent
	if spec.Parent != "" {
		parent = clean(spec.Parent)
	}
	m.adopt(parent)
	return m.existing(filepath.Join(parent, m.prefix+"-"+spec.ID))
}

// Reserve makes the group that spec names, empty and not limited yet, for a
// runtime to use: one that makes it itself fails if another daemon that shares
// the parent removes that in the same moment. The caller removes the group.
func (m *Manager) Reserve(spec Spec) (_ *Group, err error) {
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	g := m.Existing(spec)
	var all []*Hierarchy
	for _, d := range g.dirs {
		all = append(all, d.h)
	}
	for _, bare := range m.tree.Bare {
		all = append(all, &Hierarchy{Dir: bare})
	}
	for _, h := range all {
		path, err := m.makeBelow(h, filepath.Dir(g.path), filepath.Base(g.path))
		if err != nil {
			return nil, err
		}
		undo.Add(func() error { return RemoveTree(path) })
	}
	undo.Keep()
	g.pids = spec.Limits.Pids // the runtime sets it
	return g, nil
}

func (m *Manager) existing(path string) *Group {
	g := &Group{m: m, path: path}
	if m.tree.V2 != "" {
		g.dirs = []dir{{path: filepath.Join(m.tree.V2, g.path), join: -1, view: -1}}
	}
	for i, h := range m.tree.V1 {
		g.dirs = append(g.dirs, dir{path: filepath.Join(h.Dir, g.path), h: &m.tree.V1[i], join: -1, view: -1})
	}
	return g
}

// Spec says what kind of group is needed.
type Spec struct {
	ID         string // names the group if it isn't one made ahead
	Parent     string // "" is the manager's
	Limits     Limits
	AllDevices bool // don't confine devices
}

// Take returns a group as spec says. The caller must Release it.
func (m *Manager) Take(ctx context.Context, spec Spec) (*Group, error) {
	l := spec.Limits
	plain := l.CPUShares == 0 && l.CPUPeriod == 0 && l.CPUQuota == 0 && l.CpusetCpus == "" && l.CpusetMems == ""
	if spec.Parent == "" && !spec.AllDevices && (plain || m.tree.V2 != "") {
		var g *Group
		select {
		case g = <-m.ready:
		default:
		}
		if g != nil {
			if err := g.limit(l); err != nil {
				g.Release()
				return nil, err
			}
			return g, nil
		}
	}
	if strings.ContainsAny(spec.ID, "/\x00") {
		return nil, fmt.Errorf("make cgroup: bad name %q", spec.ID)
	}
	parent := m.parent
	if spec.Parent != "" {
		parent = clean(spec.Parent)
	}
	g, err := m.make(parent, m.prefix+"-"+spec.ID, spec)
	if err != nil {
		return nil, err
	}
	if err := g.limit(l); err != nil {
		g.Release()
		return nil, err
	}
	return g, nil
}

// fill makes groups ahead until ctx ends.
func (m *Manager) fill(ctx context.Context) {
	for i := 0; ; i++ {
		g, err := m.make(m.parent, fmt.Sprintf("%s-ahead%d", m.prefix, i), Spec{})
		if err != nil {
			// Take will meet the same error and report it.
			m.log.Warn("make cgroup ahead", "error", err)
			return
		}
		select {
		case m.ready <- g:
		case <-ctx.Done():
			m.remove(g)
			return
		}
	}
}

// make makes a group's directories.
func (m *Manager) make(parent, name string, spec Spec) (_ *Group, err error) {
	g := &Group{m: m}
	defer func() {
		if err != nil {
			err = errors.Join(err, g.destroy())
		}
	}()
	if m.tree.V2 != "" {
		d, err := m.makeDir(nil, parent, name)
		if err != nil {
			return nil, err
		}
		g.dirs = append(g.dirs, d)
		if !spec.AllDevices && m.filter >= 0 {
			err = attachDevices(d.join, m.filter)
		}
		return g, err
	}
	for i := range m.tree.V1 {
		h := &m.tree.V1[i]
		if !m.useful(h, parent, spec.Limits) {
			continue
		}
		d, err := m.makeDir(h, parent, name)
		if err != nil {
			return nil, err
		}
		g.dirs = append(g.dirs, d)
		if err := g.dirs[len(g.dirs)-1].open(!spec.AllDevices); err != nil {
			return nil, err
		}
		if parent != m.parent && !spec.AllDevices && d.has("devices") {
			if err := setDevicesV1(d.path, DefaultDevices); err != nil {
				return nil, err
			}
		}
	}
	if parent == m.parent && !spec.AllDevices && m.devices.path != "" {
		g.dirs = append(g.dirs, m.devices)
	}
	return g, nil
}

// useful says whether a group joins h. Below a parent that the user named, it
// joins all: the parent may have limits.
func (m *Manager) useful(h *Hierarchy, parent string, l Limits) bool {
	if parent != m.parent {
		return true
	}
	has := func(c string) bool { return slices.Contains(h.Controllers, c) }
	return has("memory") || has("pids") ||
		has("cpu") && (l.CPUShares != 0 || l.CPUPeriod != 0 || l.CPUQuota != 0) ||
		has("cpuset") && (l.CpusetCpus != "" || l.CpusetMems != "")
}

// mostTries is how often a group's directory is tried to be made while others
// remove its parent, which they do once, when they end.
const mostTries = 100

// makeBelow makes a group's directory in h, nil for version 2. From then on its
// parent stays.
func (m *Manager) makeBelow(h *Hierarchy, parent, name string) (string, error) {
	root := m.tree.V2
	if h != nil {
		root = h.Dir
	}
	path := filepath.Join(root, parent, name)
	var err error
	for range mostTries {
		if err = m.makeParent(h, root, parent); err == nil {
			err = m.mkdir(path, 0o755)
		}
		if !gone(err) {
			break
		}
		// Another daemon that shares the parent has removed it.
		m.forgetParent(filepath.Join(root, parent))
	}
	if err != nil {
		return "", fmt.Errorf("make cgroup: %w", err)
	}
	if h != nil && slices.Contains(h.Controllers, "cpuset") {
		if err := InheritCpuset(path); err != nil {
			return "", errors.Join(err, RemoveTree(path))
		}
	}
	return path, nil
}

// makeDir makes a group's directory in one hierarchy and opens what is needed
// to join it.
func (m *Manager) makeDir(h *Hierarchy, parent, name string) (dir, error) {
	path, err := m.makeBelow(h, parent, name)
	if err != nil {
		return dir{}, err
	}
	d := dir{path: path, h: h, view: -1}
	if h == nil {
		d.join, err = unix.Open(path, unix.O_DIRECTORY|unix.O_PATH|unix.O_CLOEXEC, 0)
	} else {
		d.join, err = unix.Open(filepath.Join(path, "tasks"), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return dir{}, errors.Join(fmt.Errorf("open cgroup %s: %w", path, err), RemoveTree(path))
	}
	return d, nil
}

// open makes the detached mount of d for the container.
func (d *dir) open(readonly bool) error {
	fd, err := unix.OpenTree(unix.AT_FDCWD, d.path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("clone mount of cgroup %s: %w", d.path, err)
	}
	d.view = fd
	attr := unix.MountAttr{
		Attr_set:    unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC,
		Propagation: unix.MS_PRIVATE, // what a step mounts in it stays with the step
	}
	if readonly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return fmt.Errorf("set attributes of cgroup mount %s: %w", d.path, err)
	}
	return nil
}

func (m *Manager) forgetParent(full string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.parents, full)
}

// makeParent makes the directories of parent, once.
func (m *Manager) makeParent(h *Hierarchy, root, parent string) error {
	full := filepath.Join(root, parent)
	m.mu.Lock()
	_, known := m.parents[full]
	m.mu.Unlock()
	if known {
		return nil
	}
	if h == nil {
		if err := enableControllers(root, true); err != nil {
			return err
		}
	}
	path := root
	for part := range strings.SplitSeq(strings.Trim(parent, "/"), "/") {
		if part == "" {
			continue
		}
		path = filepath.Join(path, part)
		if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("make cgroup parent: %w", err)
		}
		var err error
		switch {
		case h == nil:
			err = enableControllers(path, false)
		case slices.Contains(h.Controllers, "cpuset"):
			err = InheritCpuset(path)
		}
		if err != nil {
			return err
		}
	}
	m.mu.Lock()
	m.parents[full] = root
	m.mu.Unlock()
	return nil
}

// InheritCpuset gives a new v1 cpuset group its parent's values; it can't be
// joined without any.
func InheritCpuset(path string) error {
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		own, err := os.ReadFile(filepath.Join(path, file))
		if err != nil {
			return fmt.Errorf("inherit cpuset: %w", err)
		}
		if strings.TrimSpace(string(own)) != "" {
			continue
		}
		value, err := os.ReadFile(filepath.Join(filepath.Dir(path), file))
		if err != nil {
			return fmt.Errorf("inherit cpuset: %w", err)
		}
		if err := write(filepath.Join(path, file), strings.TrimSpace(string(value))); err != nil {
			return fmt.Errorf("inherit cpuset: %w", err)
		}
	}
	return nil
}

// remove queues g for removal.
func (m *Manager) remove(g *Group) { m.removed <- g }

func (m *Manager) removeLoop() {
	for g := range m.removed {
		if err := g.destroy(); err != nil {
			m.log.Warn("remove cgroup", "error", err)
		}
	}
}
