package ops

import (
	"fmt"
	"net"
	"path"

	"github.com/moby/buildkit/solver/pb"
)

// checkExec is check for exec ops.
func checkExec(op *pb.ExecOp, inputs int) (outputs int, err error) {
	if op == nil {
		return 0, invalid("exec", "it is missing")
	}
	if err := checkMeta(op.Meta); err != nil {
		return 0, err
	}
	if err := checkModes(op); err != nil {
		return 0, err
	}
	return checkMounts(op, inputs)
}

// checkModes checks what is left beside meta and mounts.
func checkModes(op *pb.ExecOp) error {
	if _, ok := pb.NetMode_name[int32(op.Network)]; !ok {
		return invalid("exec.network", "%d is no known mode", op.Network)
	}
	if _, ok := pb.SecurityMode_name[int32(op.Security)]; !ok {
		return invalid("exec.security", "%d is no known mode", op.Security)
	}
	for i, s := range op.Secretenv {
		if s.ID == "" {
			return invalid(fmt.Sprintf("exec.secretenv[%d].ID", i), "secret ID missing for %q environment variable", s.Name)
		}
		if s.Name == "" {
			return invalid(fmt.Sprintf("exec.secretenv[%d].name", i), "the variable for secret %q has no name", s.ID)
		}
	}
	return nil
}

func checkMeta(meta *pb.Meta) error {
	if meta == nil {
		return invalid("exec.meta", "it is missing")
	}
	if len(meta.Args) == 0 {
		return invalid("exec.meta.args", "a step needs a command")
	}
	for i, h := range meta.ExtraHosts {
		if net.ParseIP(h.IP) == nil {
			return invalid(fmt.Sprintf("exec.meta.extraHosts[%d].IP", i), "failed to parse IP %s", h.IP)
		}
	}
	return nil
}

func checkMounts(op *pb.ExecOp, inputs int) (outputs int, err error) {
	if len(op.Mounts) == 0 {
		return 0, invalid("exec.mounts", "%w", errNoMounts)
	}
	root := false
	for i, m := range op.Mounts {
		isRoot := mountTarget(op.Meta.Cwd, m.Dest) == pb.RootMount
		err := checkMount(m, inputs)
		if err == nil && isRoot {
			err = checkRoot(m, root)
		}
		if err == nil && hasOutput(m) {
			err = checkPosition("output", m.Output, outputs)
			outputs++
		}
		if err != nil {
			return 0, within(fmt.Sprintf("exec.mounts[%d]", i), err)
		}
		root = root || isRoot
	}
	if !root {
		return 0, invalid("exec.mounts", "%w", errNoMounts)
	}
	return outputs, nil
}

func checkRoot(m *pb.Mount, another bool) error {
	if another {
		return invalid("dest", "%q is a second root filesystem", m.Dest)
	}
	if m.Dest != pb.RootMount {
		return invalid("dest", "%q is the root filesystem, which must be written %q", m.Dest, pb.RootMount)
	}
	if m.MountType != pb.MountType_BIND {
		return invalid("mountType", "invalid mount type %s for %s", m.MountType, m.Dest)
	}
	if path.Join("/", m.Selector) != "/" {
		return invalid("selector", "the root filesystem is mounted as a whole, not only %q of it", m.Selector)
	}
	return nil
}

func checkMount(m *pb.Mount, inputs int) error {
	if m.Input < int64(pb.Empty) || m.Input >= int64(inputs) {
		return invalid("input", "%d is none of its %d inputs", m.Input, inputs)
	}
	if m.ResultID != "" {
		return invalid("resultID", "it has a meaning only for containers that a frontend starts")
	}
	if _, ok := pb.MountContentCache_name[int32(m.ContentCache)]; !ok {
		return invalid("contentCache", "%d is no known choice", m.ContentCache)
	}
	if m.ContentCache == pb.MountContentCache_ON && keyedByInput(m) && !contentIsSafe(m) {
		return invalid("contentCache", "a part of an input that the step may change can't be matched by content")
	}
	return checkMountOptions(m)
}

func checkMountOptions(m *pb.Mount) error {
	switch m.MountType {
	case pb.MountType_BIND:
		return nil
	case pb.MountType_TMPFS:
		if m.TmpfsOpt != nil && m.TmpfsOpt.Size < 0 {
			return invalid("TmpfsOpt.size", "%d is negative", m.TmpfsOpt.Size)
		}
		return nil
	case pb.MountType_CACHE:
		if m.CacheOpt == nil {
			return invalid("cacheOpt", "missing cache mount options")
		}
		if _, ok := pb.CacheSharingOpt_name[int32(m.CacheOpt.Sharing)]; !ok {
			return invalid("cacheOpt.sharing", "%d is no known way of sharing", m.CacheOpt.Sharing)
		}
		return nil
	case pb.MountType_SECRET:
		if m.SecretOpt == nil {
			return invalid("secretOpt", "invalid secret mount options")
		}
		if m.SecretOpt.ID == "" {
			return invalid("secretOpt.ID", "secret ID missing from mount options")
		}
		return nil
	case pb.MountType_SSH:
		if m.SSHOpt == nil {
			return invalid("SSHOpt", "invalid SSH mount options")
		}
		return nil
	}
	return invalid("mountType", "%d is no known type", m.MountType)
}

// hasOutput says whether m makes one of the op's outputs: what a bind mount
// holds afterwards, or what a cache mount was based on.
func hasOutput(m *pb.Mount) bool {
	if m.Output == int64(pb.SkipOutput) {
		return false
	}
	switch m.MountType {
	case pb.MountType_BIND:
		return true
	case pb.MountType_CACHE:
		return m.Input != int64(pb.Empty)
	}
	return false
}

// mountTarget is the absolute path of a mount; dest may be relative to cwd.
func mountTarget(cwd, dest string) string {
	if path.IsAbs(dest) {
		return path.Clean(dest)
	}
	return path.Join("/", cwd, dest)
}

// checkEntitlements refuses what the build was not granted (CTL-023).
func checkEntitlements(op *pb.ExecOp, granted map[string]bool) error {
	if op.Network == pb.NetMode_HOST && !granted[entitlementNetworkHost] {
		return denied("exec.network", "%s is not allowed", entitlementNetworkHost)
	}
	if op.Security == pb.SecurityMode_INSECURE && !granted[entitlementInsecure] {
		return denied("exec.security", "%s is not allowed", entitlementInsecure)
	}
	return nil
}

// Entitlements that exec ops may need.
const (
	entitlementNetworkHost = "network.host"
	entitlementInsecure    = "security.insecure"
)
