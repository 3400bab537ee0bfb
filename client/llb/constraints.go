package llb

import (
	"fmt"
	"maps"
	"slices"

	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/apicaps"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Constraints are what any operation may carry beside its own fields: the
// platform that it is for, its metadata and where it stands in a source file.
// Only the platform and the worker filters are part of its digest.
type Constraints struct {
	platform  *ocispec.Platform
	filters   []string
	localID   string
	meta      metadata
	locations []location
}

// metadata is pb.OpMetadata as a plain value. Nil means unset throughout.
type metadata struct {
	ignoreCache bool
	description map[string]string
	exportCache *bool
	group       *pb.ProgressGroup
	resources   *pb.LinuxResources
	caps        map[string]bool
}

// ConstraintsOpt changes the constraints of one operation, or of all when it
// is given to Marshal. It may be used wherever any other option may.
type ConstraintsOpt func(*Constraints)

func newConstraints(opts []ConstraintsOpt) Constraints {
	var c Constraints
	for _, o := range opts {
		o(&c)
	}
	return c
}

// clone returns a copy that may be changed without changing c.
func (c Constraints) clone() Constraints {
	c.filters = slices.Clone(c.filters)
	c.locations = slices.Clone(c.locations)
	c.meta.description = maps.Clone(c.meta.description)
	c.meta.caps = maps.Clone(c.meta.caps)
	return c
}

// need demands a capability of the daemon.
func (c *Constraints) need(caps ...apicaps.CapID) {
	if c.meta.caps == nil {
		c.meta.caps = make(map[string]bool, len(caps))
	}
	for _, id := range caps {
		c.meta.caps[string(id)] = true
	}
}

// over returns the metadata of base with what m sets laid over it.
func (m metadata) over(base metadata) metadata {
	base.ignoreCache = base.ignoreCache || m.ignoreCache
	base.description = union(base.description, m.description)
	base.caps = union(base.caps, m.caps)
	if m.exportCache != nil {
		base.exportCache = m.exportCache
	}
	if m.group != nil {
		base.group = m.group
	}
	if m.resources != nil {
		base.resources = m.resources
	}
	return base
}

func union[V any](a, b map[string]V) map[string]V {
	if len(b) == 0 {
		return a
	}
	out := make(map[string]V, len(a)+len(b))
	maps.Copy(out, a)
	maps.Copy(out, b)
	return out
}

func (m metadata) toPB() *pb.OpMetadata {
	md := &pb.OpMetadata{
		IgnoreCache:    m.ignoreCache,
		Description:    m.description,
		ProgressGroup:  m.group,
		LinuxResources: m.resources,
		Caps:           m.caps,
	}
	if m.exportCache != nil {
		md.ExportCache = &pb.ExportCache{Value: *m.exportCache}
	}
	return md
}

// IgnoreCache makes the operation run even if its result is cached.
var IgnoreCache ConstraintsOpt = func(c *Constraints) { c.meta.ignoreCache = true }

// WithDescription adds to the free-form description of the operation.
func WithDescription(m map[string]string) ConstraintsOpt {
	return func(c *Constraints) { c.meta.description = union(c.meta.description, m) }
}

// WithCustomName sets the name under which progress shows the operation.
func WithCustomName(name string) ConstraintsOpt {
	return WithDescription(map[string]string{"llb.customname": name})
}

// WithCustomNamef is WithCustomName with a format.
func WithCustomNamef(format string, a ...any) ConstraintsOpt {
	return WithCustomName(fmt.Sprintf(format, a...))
}

// WithExportCache makes the result part of exported caches.
func WithExportCache() ConstraintsOpt { return exportCache(true) }

// WithoutExportCache keeps the result out of exported caches.
func WithoutExportCache() ConstraintsOpt { return exportCache(false) }

func exportCache(v bool) ConstraintsOpt {
	return func(c *Constraints) { c.meta.exportCache = &v }
}

// ProgressGroup shows the operation within a group of that id and name. A weak
// group is shown only if another operation makes it visible.
func ProgressGroup(id, name string, weak bool) ConstraintsOpt {
	return func(c *Constraints) { c.meta.group = &pb.ProgressGroup{Id: id, Name: name, Weak: weak} }
}

// LinuxResources limits a command's use of CPU and memory. Zero is no limit.
type LinuxResources struct {
	Memory, MemorySwap int64 // bytes; MemorySwap may be -1 for unlimited
	CPUShares          uint64
	CPUPeriod          uint64
	CPUQuota           int64
	CpusetCpus         string
	CpusetMems         string
}

// WithLinuxResources limits a command. The limits are not part of its digest.
func WithLinuxResources(r LinuxResources) ConstraintsOpt {
	return func(c *Constraints) {
		c.meta.resources = &pb.LinuxResources{
			Memory:     r.Memory,
			MemorySwap: r.MemorySwap,
			CpuShares:  r.CPUShares,
			CpuPeriod:  r.CPUPeriod,
			CpuQuota:   r.CPUQuota,
			CpusetCpus: r.CpusetCpus,
			CpusetMems: r.CpusetMems,
		}
	}
}

// Platform sets the platform of an operation or, given to Marshal, of all that
// have none.
func Platform(p ocispec.Platform) ConstraintsOpt {
	return func(c *Constraints) { c.platform = &p }
}

// Require adds filters that a worker's labels must match.
func Require(filters ...string) ConstraintsOpt {
	return func(c *Constraints) { c.filters = append(slices.Clip(c.filters), filters...) }
}

// LocalUniqueID replaces the random id that keeps a local source without a
// session apart from those of other clients.
func LocalUniqueID(id string) ConstraintsOpt {
	return func(c *Constraints) { c.localID = id }
}

// Platforms by name.
var (
	LinuxAmd64   = Platform(ocispec.Platform{OS: "linux", Architecture: "amd64"})
	LinuxArm64   = Platform(ocispec.Platform{OS: "linux", Architecture: "arm64"})
	LinuxArmhf   = Platform(ocispec.Platform{OS: "linux", Architecture: "arm", Variant: "v7"})
	LinuxArmel   = Platform(ocispec.Platform{OS: "linux", Architecture: "arm", Variant: "v6"})
	LinuxS390x   = Platform(ocispec.Platform{OS: "linux", Architecture: "s390x"})
	LinuxPpc64le = Platform(ocispec.Platform{OS: "linux", Architecture: "ppc64le"})
	LinuxRiscv64 = Platform(ocispec.Platform{OS: "linux", Architecture: "riscv64"})
	Darwin       = Platform(ocispec.Platform{OS: "darwin", Architecture: "amd64"})
	Windows      = Platform(ocispec.Platform{OS: "windows", Architecture: "amd64"})
)

// A ConstraintsOpt is an option of every kind.

func (o ConstraintsOpt) applyRun(r *runInfo)      { o(&r.constraints) }
func (o ConstraintsOpt) applyImage(s *source)     { o(&s.constraints) }
func (o ConstraintsOpt) applyBlob(s *source)      { o(&s.constraints) }
func (o ConstraintsOpt) applyOCILayout(s *source) { o(&s.constraints) }
func (o ConstraintsOpt) applyLocal(s *source)     { o(&s.constraints) }
func (o ConstraintsOpt) applyHTTP(s *source)      { o(&s.constraints) }
func (o ConstraintsOpt) applyGit(s *source)       { o(&s.constraints) }
