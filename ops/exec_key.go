package ops

import (
	"context"
	"path"
	"slices"
	"strings"

	"github.com/kilnbuild/kiln/cache/contenthash"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
)

const execCacheType = "buildkit.exec.v0"

// CacheMap is the digest of what the step would do, whatever it is done to
// (LLB-150), with a selector and, where it is safe, a content digest for every
// input (LLB-151).
func (e *execOp) CacheMap(context.Context, solver.Asker, int) (*solver.CacheMap, bool, error) {
	m, more, err := definitionKey(struct {
		Type       string
		Exec       *pb.ExecOp
		OS         string
		Arch       string
		Variant    string   `json:",omitempty"`
		OSVersion  string   `json:",omitempty"`
		OSFeatures []string `json:",omitempty"`
	}{
		Type:       execCacheType,
		Exec:       keyForm(e.op),
		OS:         e.platform.OS,
		Arch:       e.platform.Architecture,
		Variant:    e.platform.Variant,
		OSVersion:  e.platform.OSVersion,
		OSFeatures: e.platform.OSFeatures,
	}, len(e.pb.Inputs))
	if err != nil {
		return nil, false, err
	}
	for i, dep := range mountDeps(e.op, len(e.pb.Inputs)) {
		m.Deps[i] = dep.solverDep()
	}
	return m, more, nil
}

// keyForm returns op without what must not change its key: how the network is
// reached, where cache mounts are kept, and which part of an input is mounted,
// which the input's selector says.
func keyForm(op *pb.ExecOp) *pb.ExecOp {
	op = op.CloneVT()
	op.Meta.ProxyEnv = nil
	for _, h := range op.Meta.ExtraHosts {
		h.IP = ""
	}
	for _, m := range op.Mounts {
		m.Selector = ""
		if m.CacheOpt != nil && !isDefaultCache(m) {
			m.CacheOpt.ID = ""
			m.CacheOpt.Sharing = pb.CacheSharingOpt_SHARED
		}
	}
	if len(op.Mounts) == 1 && isPlainRoot(op.Mounts[0]) {
		// Upstream once left mounts out by mistake; the most common form of
		// step keeps the key it had then.
		op.Mounts = nil
	}
	return op
}

// isDefaultCache says whether m is the shared cache mount that a Dockerfile
// gets without naming it, with or without a namespace. Its id stays in the key.
func isDefaultCache(m *pb.Mount) bool {
	if m.CacheOpt.Sharing != pb.CacheSharingOpt_SHARED {
		return false
	}
	if m.CacheOpt.ID == m.Dest {
		return true
	}
	_, name, ok := strings.Cut(m.CacheOpt.ID, "/")
	return ok && name == m.Dest
}

func isPlainRoot(m *pb.Mount) bool {
	return m.Dest == pb.RootMount && m.Selector == "" && !m.Readonly && m.MountType == pb.MountType_BIND &&
		m.CacheOpt == nil && m.SSHOpt == nil && m.SecretOpt == nil && m.ResultID == ""
}

// mountDep is how the mounts of one input make it matter.
type mountDep struct {
	paths     []string // mounted, in the order of the mounts
	noContent bool     // it can't be matched by content
}

func mountDeps(op *pb.ExecOp, inputs int) []mountDep {
	deps := make([]mountDep, inputs)
	for _, m := range op.Mounts {
		if !keyedByInput(m) {
			continue
		}
		dep := &deps[m.Input]
		dep.paths = append(dep.paths, path.Join("/", m.Selector))
		// One mount that can't be matched by content is enough: a change made
		// through it would be missing from the digest.
		dep.noContent = dep.noContent || !wantsContent(m)
	}
	for i := range deps {
		if len(deps[i].paths) == 0 {
			deps[i].noContent = true
		}
	}
	return deps
}

// keyedByInput says whether what m mounts comes from an input.
func keyedByInput(m *pb.Mount) bool {
	switch m.MountType {
	case pb.MountType_SECRET, pb.MountType_SSH, pb.MountType_TMPFS:
		return false
	}
	return m.Input != int64(pb.Empty)
}

// contentIsSafe says whether the digest of what m selects is all that can
// reach the step's results. It isn't if the step writes to a part of an input
// that becomes an output: the rest of the input is in that output too.
func contentIsSafe(m *pb.Mount) bool {
	return m.Output == int64(pb.SkipOutput) || m.Readonly || path.Join("/", m.Selector) == pb.RootMount
}

func wantsContent(m *pb.Mount) bool {
	switch m.ContentCache {
	case pb.MountContentCache_OFF:
		return false
	case pb.MountContentCache_DEFAULT:
		if m.Dest == pb.RootMount {
			return false // a whole root filesystem costs much and rarely matches
		}
	}
	return contentIsSafe(m)
}

func (d mountDep) solverDep() solver.Dep {
	dep := solver.Dep{Prepare: extract}
	if len(d.paths) > 0 {
		dep.Selector = digest.FromString(strings.Join(d.paths, "\x00"))
	}
	if !d.noContent {
		dep.Content = fileContent(contentSelectors(d.paths))
	}
	return dep
}

// contentSelectors are what is digested of an input with the given paths: the
// whole of it if one of them is its root.
func contentSelectors(paths []string) (sels []fileSelector) {
	if slices.Contains(paths, "/") {
		return []fileSelector{{path: "/"}}
	}
	for _, p := range outermost(paths) {
		sels = append(sels, fileSelector{path: p, opts: contenthash.Options{FollowLinks: true}})
	}
	return sels
}

// outermost returns paths sorted, without doubles and without those that lie
// below another.
func outermost(paths []string) []string {
	if len(paths) <= 1 {
		return paths
	}
	sorted := slices.Clone(paths)
	slices.Sort(sorted)
	sorted = slices.Compact(sorted)
	return slices.DeleteFunc(sorted, func(p string) bool {
		return slices.ContainsFunc(paths, func(parent string) bool {
			return p != parent && strings.HasPrefix(p, strings.TrimSuffix(parent, "/")+"/")
		})
	})
}
