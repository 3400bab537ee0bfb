package llb

import "github.com/moby/buildkit/solver/pb"

// mount is a file system that a command sees.
type mount struct {
	target   string
	source   *output // nil is scratch
	output   *output
	selector string
	readonly bool
	noOutput bool
	tmpfs    bool
	size     int64 // of a tmpfs; 0 is unlimited
	cacheID  string
	sharing  CacheMountSharingMode
	content  MountContentCache
}

// hasOutput reports whether what the command writes is kept.
func (m *mount) hasOutput() bool {
	return !m.noOutput && !m.readonly && !m.tmpfs && m.cacheID == ""
}

// toPB makes the mount but for its input and output.
func (m *mount) toPB(c *Constraints) *pb.Mount {
	pm := &pb.Mount{Dest: m.target, Selector: m.selector, Readonly: m.readonly}
	if m.selector != "" {
		c.need(pb.CapExecMountSelector)
	}
	if m.content != MountContentCacheDefault {
		c.need(pb.CapExecMountContentCache)
		pm.ContentCache = pb.MountContentCache(m.content)
	}
	switch {
	case m.cacheID != "":
		c.need(pb.CapExecMountCache, pb.CapExecMountCacheSharing)
	case m.tmpfs:
		c.need(pb.CapExecMountTmpfs)
	case m.source != nil:
		c.need(pb.CapExecMountBind)
	}
	if m.noOutput {
		c.need(pb.CapExecMountBindReadWriteNoOutput)
	}
	if m.cacheID != "" {
		pm.MountType = pb.MountType_CACHE
		pm.CacheOpt = &pb.CacheOpt{ID: m.cacheID, Sharing: pb.CacheSharingOpt(m.sharing)}
	}
	if m.tmpfs {
		pm.MountType = pb.MountType_TMPFS
		pm.TmpfsOpt = &pb.TmpfsOpt{Size: m.size}
		if m.size > 0 {
			c.need(pb.CapExecMountTmpfsSize)
		}
	}
	return pm
}

// MountOption changes a mount.
type MountOption func(*mount)

// Readonly lets the command only read the mount.
func Readonly(m *mount) { m.readonly = true }

// ForceNoOutput throws away what the command writes to the mount.
func ForceNoOutput(m *mount) { m.noOutput = true }

// SourcePath mounts only this path of the source.
func SourcePath(path string) MountOption { return func(m *mount) { m.selector = path } }

// Tmpfs mounts memory instead of a source; size limits its bytes, 0 doesn't.
func Tmpfs(size int64) MountOption {
	return func(m *mount) { m.tmpfs, m.size = true, size }
}

// CacheMountSharingMode says what commands that run at once do with a cache.
type CacheMountSharingMode pb.CacheSharingOpt

// The sharing modes.
const (
	CacheMountShared  = CacheMountSharingMode(pb.CacheSharingOpt_SHARED)
	CacheMountPrivate = CacheMountSharingMode(pb.CacheSharingOpt_PRIVATE)
	CacheMountLocked  = CacheMountSharingMode(pb.CacheSharingOpt_LOCKED)
)

// AsPersistentCacheDir makes the mount a directory that outlives the build and
// is found again by id; it starts as a copy of the source.
func AsPersistentCacheDir(id string, sharing CacheMountSharingMode) MountOption {
	return func(m *mount) { m.cacheID, m.sharing = id, sharing }
}

// MountContentCache says whether a command is a cache hit when the contents of
// a mount are the same though what made them differs.
type MountContentCache pb.MountContentCache

// The values of MountContentCache.
const (
	MountContentCacheDefault = MountContentCache(pb.MountContentCache_DEFAULT)
	MountContentCacheOn      = MountContentCache(pb.MountContentCache_ON)
	MountContentCacheOff     = MountContentCache(pb.MountContentCache_OFF)
)

// ContentCache sets whether the contents of the mount are compared.
func ContentCache(mode MountContentCache) MountOption { return func(m *mount) { m.content = mode } }
