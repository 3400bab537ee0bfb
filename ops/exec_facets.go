package ops

import (
	"fmt"
	"strings"

	"github.com/moby/buildkit/solver/pb"
)

func (e *execOp) kind() string { return "exec" }

// facets takes the op apart that is hashed for the key (exec_key.go).
func (e *execOp) facets() []Facet {
	var f facets
	op := keyForm(e.op)
	m := op.Meta
	f.private("command", strings.Join(m.Args, "\x00"))
	for i, kv := range m.Env {
		name, value, _ := strings.Cut(kv, "=")
		if duplicateEnv(m.Env[:i], name) {
			name += fmt.Sprintf(" (%d)", i)
		}
		f.private("env "+name, value)
	}
	f.private("order of the environment", envOrder(m.Env))
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
		f.add(mountName(op.Mounts[:i], mount), mountText(mount))
	}
	return f
}

func duplicateEnv(before []string, name string) bool {
	for _, kv := range before {
		if n, _, _ := strings.Cut(kv, "="); n == name {
			return true
		}
	}
	return false
}

// envOrder is the names alone: the key tells apart what is said in another
// order.
func envOrder(env []string) string {
	names := make([]string, len(env))
	for i, kv := range env {
		names[i], _, _ = strings.Cut(kv, "=")
	}
	return strings.Join(names, "\x00")
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
	if m.Output != int64(pb.SkipOutput) {
		add("output=%d", m.Output)
	}
	if t := m.TmpfsOpt; t != nil {
		add("size=%d", t.Size)
	}
	if c := m.CacheOpt; c != nil {
		add("id=%s sharing=%s", c.ID, strings.ToLower(c.Sharing.String()))
	}
	if s := m.SecretOpt; s != nil {
		add("id=%s uid=%d gid=%d mode=%o optional=%v", s.ID, s.Uid, s.Gid, s.Mode, s.Optional)
	}
	if s := m.SSHOpt; s != nil {
		add("id=%s uid=%d gid=%d mode=%o optional=%v", s.ID, s.Uid, s.Gid, s.Mode, s.Optional)
	}
	if m.ContentCache != pb.MountContentCache_DEFAULT {
		add("content=%s", strings.ToLower(m.ContentCache.String()))
	}
	if m.ResultID != "" {
		add("result=%s", m.ResultID)
	}
	return strings.Join(words, " ")
}

// reads are the parts of an input that its mounts make matter by content.
func (e *execOp) reads(input int) []fileSelector {
	deps := mountDeps(e.op, len(e.pb.Inputs))
	if input >= len(deps) || deps[input].noContent {
		return nil
	}
	return contentSelectors(deps[input].paths)
}
