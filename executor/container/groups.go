//go:build linux && (amd64 || arm64)

package container

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kilnbuild/kiln/executor/cgroup"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// groups are a container's own cgroups.
type groups struct {
	V2 string `json:"v2,omitempty"` // directory
	// V1 are directories by the controllers that a hierarchy has, such as
	// "cpu,cpuacct".
	V1 map[string]string `json:"v1,omitempty"`
}

// newGroups says where the cgroups of a container belong.
func newGroups(tree *cgroup.Tree, name, id string) (groups, error) {
	if strings.Contains(name, ":") {
		return groups{}, fmt.Errorf("linux.cgroupsPath %q is one for systemd: "+
			"give --systemd-cgroup, or set the cgroup driver of what calls this runtime to cgroupfs", name)
	}
	if name == "" {
		name = id
	}
	own, err := ownCgroups("/proc/self/cgroup")
	if err != nil {
		return groups{}, err
	}
	return placeGroups(tree, own, name), nil
}

// placeGroups puts a relative path below this process's own cgroups; on version 2
// beside it, as runc does: a group that has processes passes no controllers on, so
// that below it nothing could be limited or counted.
func placeGroups(tree *cgroup.Tree, own map[string]string, name string) groups {
	place := func(root, controllers string) string {
		if filepath.IsAbs(name) {
			return filepath.Join(root, filepath.Clean(name))
		}
		return filepath.Join(root, own[strings.Split(controllers, ",")[0]], filepath.Join("/", name))
	}
	if tree.V2 != "" {
		own[""] = path.Dir(path.Join("/", own[""]))
		return groups{V2: place(tree.V2, "")}
	}
	g := groups{V1: map[string]string{}}
	for _, h := range tree.V1 {
		g.V1[strings.Join(h.Controllers, ",")] = place(h.Dir, h.Controllers[0])
	}
	for _, dir := range tree.Bare {
		// Where systemd and others track what belongs together; a container isn't
		// a part of what this process is.
		switch named := "name=" + filepath.Base(dir); {
		case own[named] != "":
			g.V1[named] = place(dir, named)
		case own[""] != "" && isV2(dir):
			g.V1[unified] = place(dir, "")
		}
	}
	return g
}

// unified stands for the version 2 hierarchy without controllers that a machine
// with version 1 may have, too.
const unified = "unified"

func isV2(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "cgroup.controllers"))
	return err == nil
}

// ownCgroups reads the cgroups of a process by controller; that of version 2
// has the name "".
func ownCgroups(file string) (map[string]string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("find own cgroup: %w", err)
	}
	own := map[string]string{}
	for line := range strings.Lines(string(b)) {
		parts := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(parts) != 3 {
			continue
		}
		for c := range strings.SplitSeq(parts[1], ",") {
			own[c] = parts[2]
		}
	}
	return own, nil
}

func (g groups) dirs() []string {
	if g.V2 != "" {
		return []string{g.V2}
	}
	return slices.Sorted(maps.Values(g.V1))
}

// dir returns the directory that has a controller, "" if none does.
func (g groups) dir(controller string) string {
	if g.V2 != "" {
		return g.V2
	}
	for names, dir := range g.V1 {
		if slices.Contains(strings.Split(names, ","), controller) {
			return dir
		}
	}
	return ""
}

// views are the directories as they are shown in the container; nil on version
// 2, where the namespace shows it.
func (g groups) views() map[string]string {
	if g.V2 != "" {
		return nil
	}
	views := map[string]string{}
	for names, dir := range g.V1 {
		if names == unified {
			continue
		}
		views[strings.TrimPrefix(names, "name=")] = dir
	}
	return views
}

// make makes the directories.
func (g groups) make(tree *cgroup.Tree) error {
	for _, dir := range g.dirs() {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("make cgroup: %w", err)
		}
	}
	if g.V2 != "" {
		return passControllers(tree.V2, g.V2)
	}
	dir := g.dir("cpuset")
	if dir == "" {
		return nil
	}
	// One without processors can't be joined.
	var missing []string
	for d := dir; len(missing) < 64; d = filepath.Dir(d) {
		missing = append(missing, d)
		if b, err := os.ReadFile(filepath.Join(d, "cpuset.cpus")); err != nil || strings.TrimSpace(string(b)) != "" {
			break
		}
	}
	for _, d := range slices.Backward(missing) {
		if err := cgroup.InheritCpuset(d); err != nil {
			return err
		}
	}
	return nil
}

// passControllers turns on all controllers that there are on the way from root
// down to dir's parent. One that can't be turned on is missed when a limit
// needs it.
func passControllers(root, dir string) error {
	rel, err := filepath.Rel(root, filepath.Dir(dir))
	if err != nil {
		return fmt.Errorf("make cgroup: %w", err)
	}
	for at, rest := root, rel; ; {
		b, err := os.ReadFile(filepath.Join(at, "cgroup.controllers"))
		if err != nil {
			return fmt.Errorf("list cgroup controllers: %w", err)
		}
		for _, c := range strings.Fields(string(b)) {
			writeControl(filepath.Join(at, "cgroup.subtree_control"), "+"+c) //nolint:errcheck // see above
		}
		if rest == "." || rest == "" {
			return nil
		}
		part, below, _ := strings.Cut(rest, "/")
		at, rest = filepath.Join(at, part), below
	}
}

// writeControl writes a control file in one write; it never creates one.
func writeControl(file, value string) error {
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// join moves a process into the groups, or into groups below them: those of
// sub by controller, "" standing for all others.
func (g groups) join(pid int, sub map[string]string) error {
	below := func(names, dir string) string {
		for name := range strings.SplitSeq(names, ",") {
			if s, ok := sub[name]; ok {
				return filepath.Join(dir, filepath.Join("/", s))
			}
		}
		return filepath.Join(dir, filepath.Join("/", sub[""]))
	}
	dirs := map[string]string{"": g.V2}
	if g.V2 == "" {
		dirs = g.V1
	}
	for names, dir := range dirs {
		if err := writeControl(filepath.Join(below(names, dir), "cgroup.procs"), strconv.Itoa(pid)); err != nil {
			return fmt.Errorf("join cgroup: %w", err)
		}
	}
	return nil
}

// pids lists the processes of the container, those in groups below its own
// included.
func (g groups) pids() ([]int, error) {
	top := g.V2
	for _, c := range []string{"devices", "pids", "memory", "freezer"} {
		if top == "" {
			top = g.dir(c)
		}
	}
	var pids []int
	err := filepath.WalkDir(top, func(dir string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if errors.Is(err, unix.EOPNOTSUPP) {
			return nil // it has threads of processes in a group around it
		}
		for _, f := range strings.Fields(string(b)) {
			pid, perr := strconv.Atoi(f)
			err = errors.Join(err, perr)
			pids = append(pids, pid)
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	slices.Sort(pids)
	return pids, nil
}

// remove kills what is left in the groups, and removes them.
func (g groups) remove() error {
	var errs []error
	for _, dir := range g.dirs() {
		errs = append(errs, cgroup.RemoveTree(dir))
	}
	return errors.Join(errs...)
}

// freezer returns the file that freezes the container, the one that tells how
// it is, and their values.
func (g groups) freezer() (control, report, frozen, thawed string) {
	if g.V2 != "" {
		return filepath.Join(g.V2, "cgroup.freeze"), filepath.Join(g.V2, "cgroup.events"), "1", "0"
	}
	state := filepath.Join(g.dir("freezer"), "freezer.state")
	return state, state, "FROZEN", "THAWED"
}

func (g groups) hasFreezer() bool { return g.V2 != "" || g.dir("freezer") != "" }

// frozen says whether processes are being held, or are about to be.
func (g groups) frozen() (bool, error) {
	if !g.hasFreezer() {
		return false, nil
	}
	control, _, _, thawed := g.freezer()
	b, err := os.ReadFile(control)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at freezer: %w", err)
	}
	return strings.TrimSpace(string(b)) != thawed, nil
}

// freezeInterval is how often the freezer is asked whether it is done. Version
// 1 has to be told again when processes fork while being frozen.
const freezeInterval = time.Millisecond

// freeze holds all processes, or lets them go on.
func (g groups) freeze(ctx context.Context, on bool) error {
	if !g.hasFreezer() {
		return errors.New("this machine has no freezer cgroup")
	}
	control, report, value, thawed := g.freezer()
	if !on {
		value = thawed
	}
	done := value
	if g.V2 != "" {
		done = "frozen " + value
	}
	ticks := time.NewTicker(freezeInterval)
	defer ticks.Stop()
	for {
		if err := writeControl(control, value); err != nil {
			return fmt.Errorf("freezer: %w", err)
		}
		b, err := os.ReadFile(report)
		if err != nil {
			return fmt.Errorf("freezer: %w", err)
		}
		if slices.Contains(strings.Split(strings.TrimSpace(string(b)), "\n"), done) {
			return nil
		}
		select {
		case <-ticks.C:
		case <-ctx.Done():
			return fmt.Errorf("freezer: %s doesn't become %s: %w", report, done, context.Cause(ctx))
		}
	}
}

// allowDevices applies the device rules of a spec: the last that matches
// counts.
func (g groups) allowDevices(rules []specs.LinuxDeviceCgroup) error {
	if len(rules) == 0 {
		return nil
	}
	var list []cgroup.DeviceRule
	for _, r := range rules {
		access := r.Access
		if access == "" {
			access = "rwm"
		}
		if strings.Trim(access, "rwm") != "" {
			return fmt.Errorf("linux.resources.devices: access %q has other letters than r, w and m", access)
		}
		if !slices.Contains([]string{"", "a", "b", "c"}, r.Type) {
			return fmt.Errorf("linux.resources.devices: type %q is none of a, b and c", r.Type)
		}
		list = append(list, cgroup.DeviceRule{
			Deny: !r.Allow, Any: r.Type == "" || r.Type == "a", Block: r.Type == "b", Major: number(r.Major), Minor: number(r.Minor), Access: access,
		})
	}
	// What every container has, as it has the nodes.
	list = append(list, cgroup.DefaultDevices...)
	if g.V2 != "" {
		return cgroup.ConfineV2(g.V2, list)
	}
	return cgroup.ConfineV1(g.dir("devices"), list)
}

func number(n *int64) int64 {
	if n == nil {
		return -1
	}
	return *n
}
