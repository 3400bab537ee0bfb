package ops

import (
	"fmt"
	"slices"
	"strings"

	"github.com/moby/buildkit/solver/pb"
)

func (e *execOp) kind() string { return "exec" }

// facets takes the op apart that is hashed for the key (exec_key.go).
func (e *execOp) facets() []Facet {
	f := make(facets, 0, 16) // more than most have
	op := keyForm(e.op)
	m := op.Meta
	f.private("command", strings.Join(m.Args, "\x00"))
	names := envNames(m.Env)
	for i, name := range names {
		_, value, _ := strings.Cut(m.Env[i], "=")
		if slices.Contains(names[:i], name) {
			name += fmt.Sprintf(" (%d)", i)
		}
		f.private("env "+name, value)
	}
	// The key tells apart what is said in another order.
	f.private("order of the environment", strings.Join(names, "\x00"))
	f.add("working directory", m.Cwd)
	f.add("user", m.User)
	f.add("hostname", m.Hostname)
	f.add("cgroup parent", m.CgroupParent)
	f.platform(e.platform)
	for _, h := range m.ExtraHosts {
		f.add("extra host "+h.Host, "set")
	}
	for _, u := range m.Ulimit {
		f.add("ulimit "+u.Name, fmt.Sprintf("%d:%d", u.Soft, u.Hard))
	}
	if len(m.ValidExitCodes) > 0 {
		f.add("valid exit codes", fmt.Sprint(m.ValidExitCodes))
	}
	f.flag("removal of mount stubs", m.RemoveMountStubsRecursive)
	f.add("network", strings.ToLower(op.Network.String()))
	f.add("security", strings.ToLower(op.Security.String()))
	for _, s := range op.Secretenv {
		f.add("secret variable "+s.Name, fmt.Sprintf("%s optional=%v", s.ID, s.Optional))
	}
	for _, d := range op.CdiDevices {
		f.add("device "+d.Name, fmt.Sprintf("optional=%v", d.Optional))
	}
	for i, mount := range op.Mounts {
		if !isUsualRoot(mount) {
			f.add(mountName(op.Mounts[:i], mount), mountText(mount))
		}
	}
	return f
}

func envNames(env []string) []string {
	names := make([]string, len(env))
	for i, kv := range env {
		names[i], _, _ = strings.Cut(kv, "=")
	}
	return names
}

func mountName(before []*pb.Mount, m *pb.Mount) string {
	name := "mount " + m.Dest
	for _, b := range before {
		if b.Dest == m.Dest {
			return fmt.Sprintf("%s (%d)", name, len(before))
		}
	}
	return name
}

// isUsualRoot says whether m is the root that nearly every step has. Nobody
// wrote it, and the key has it only if there are other mounts, so it is no facet.
func isUsualRoot(m *pb.Mount) bool {
	return isPlainRoot(m) && m.Input == 0 && m.Output == 0 && m.ContentCache == pb.MountContentCache_DEFAULT
}

// mountText is m in words. What it mounts is an input's matter.
func mountText(m *pb.Mount) string {
	words := []string{strings.ToLower(m.MountType.String())}
	add := func(format string, args ...any) { words = append(words, fmt.Sprintf(format, args...)) }
	if m.Readonly {
		add("readonly")
	}
	if m.Input != int64(pb.Empty) {
		add("input=%d", m.Input)
	}
	if m.Output != usualOutput(m) {
		add("output=%d", m.Output)
	}
	if t := m.TmpfsOpt; t != nil && t.Size != 0 {
		add("size=%d", t.Size)
	}
	if c := m.CacheOpt; c != nil {
		if c.ID == "" { // as keyForm leaves it
			add("with an id or sharing of its own")
		} else {
			add("id=%s", c.ID)
		}
	}
	if s := m.SecretOpt; s != nil {
		add("%s", grantText(s.ID, s.Uid, s.Gid, s.Mode, s.Optional))
	}
	if s := m.SSHOpt; s != nil {
		add("%s", grantText(s.ID, s.Uid, s.Gid, s.Mode, s.Optional))
	}
	if m.ContentCache != pb.MountContentCache_DEFAULT {
		add("content=%s", strings.ToLower(m.ContentCache.String()))
	}
	if m.ResultID != "" {
		add("result=%s", m.ResultID)
	}
	return strings.Join(words, " ")
}

// usualOutput is what clients say of a mount like m that makes none.
func usualOutput(m *pb.Mount) int64 {
	switch m.MountType {
	case pb.MountType_SECRET, pb.MountType_SSH:
		return 0
	}
	return int64(pb.SkipOutput)
}

// grantText is a secret, or an agent, in words.
func grantText(id string, uid, gid, mode uint32, optional bool) string {
	text := fmt.Sprintf("id=%s uid=%d gid=%d mode=%o", id, uid, gid, mode)
	if optional {
		text += " optional"
	}
	return text
}

// reads are the parts of an input that its mounts make matter by content.
func (e *execOp) reads(input int) []fileSelector {
	deps := mountDeps(e.op, len(e.pb.Inputs))
	if input >= len(deps) || deps[input].noContent {
		return nil
	}
	return contentSelectors(deps[input].paths)
}
