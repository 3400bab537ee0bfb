package executor

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/kilnbuild/kiln/executor/cgroup"
	"github.com/kilnbuild/kiln/executor/native"
	"github.com/kilnbuild/kiln/executor/rootfs"
	"github.com/kilnbuild/kiln/internal/rootless"
	"golang.org/x/sys/unix"
)

// Unavailable lists what processes can't have because this one is root of a user
// namespace only.
func Unavailable() ([]string, error) {
	ids := rootless.Here()
	if !ids.Mapped() {
		return nil, nil
	}
	tree, err := cgroup.Delegated()
	if err != nil {
		return nil, err
	}
	list := []string{"device nodes in images and steps", "files and processes of other ids than " + ids.Ranges(), "limits (ulimits) above the daemon's own", "other runtimes (--oci-worker-binary)"}
	if tree.V2 == "" {
		list = append(list, "limits and counts of memory, CPUs and processes, for no cgroup is delegated")
	}
	if !rootless.OwnsNetwork() {
		list = append(list, "the networks bridge and cni")
	}
	return list, nil
}

// permit makes p one that this executor can run without the machine's root: what
// it can't have and can do without is left out, which its standard error says.
// Ids that there aren't are an error.
func (e *executor) permit(p Process, user rootfs.User) (Process, error) {
	ids := rootless.Here()
	if !ids.Mapped() {
		return p, nil
	}
	for _, gid := range append([]uint32{user.GID}, user.Groups...) {
		if !ids.HasUID(user.UID) || !ids.HasGID(gid) {
			return p, ids.Explain(fmt.Errorf("run as user %q", p.User), int(user.UID), int(gid))
		}
	}
	if p.Resources != nil && *p.Resources != (Resources{}) && !e.cgroups.HasGroups() {
		warn(p.Stderr, "limits of memory, CPUs and processes have no effect: this rootless daemon has no cgroup that was delegated to it")
		p.Resources = nil
	}
	if p.CgroupParent != "" && !e.cgroups.HasGroups() {
		warn(p.Stderr, "the cgroup parent has no effect: this rootless daemon has no cgroup that was delegated to it")
		p.CgroupParent = ""
	}
	var lowered []string
	if p.Ulimits, lowered = lowerUlimits(p.Ulimits, hardLimit); len(lowered) > 0 {
		warn(p.Stderr, "a rootless daemon can't raise limits above its own: "+strings.Join(lowered, ", "))
	}
	return p, nil
}

func warn(w io.Writer, text string) {
	if w != nil {
		fmt.Fprintf(w, "kilnd: %s\n", text) //nolint:errcheck // of one who doesn't read
	}
}

// lowerUlimits bounds limits by this process's own, and says which it changed.
func lowerUlimits(limits []Ulimit, own func(name string) (uint64, bool)) (_ []Ulimit, changed []string) {
	limits = slices.Clone(limits)
	for i, l := range limits {
		most, ok := own(l.Name)
		if !ok || uint64(l.Hard) <= most {
			continue
		}
		// -1 is no limit; as an unsigned number it is the highest.
		limits[i].Hard, limits[i].Soft = int64(most), int64(min(uint64(l.Soft), most))
		changed = append(changed, fmt.Sprintf("%s is %d, not %d", l.Name, most, l.Hard))
	}
	return limits, changed
}

// hardLimit is that of this process.
func hardLimit(name string) (uint64, bool) {
	kind, ok := native.RlimitType(rlimitType(name))
	var l unix.Rlimit
	if !ok || unix.Getrlimit(kind, &l) != nil {
		return 0, false
	}
	return l.Max, true
}
