package snapshot

import (
	"fmt"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// mountSpec is a mount.Mount taken apart.
type mountSpec struct {
	fstype    string
	source    string
	bind      bool
	recursive bool     // for a bind
	set, clr  uint64   // MOUNT_ATTR_* to set and clear
	lower     []string // overlay's, top first
	upper     string
	work      string
	data      []string // options of the file system, without the above
}

// attrs are the options that are properties of a mount, not of its file system.
var attrs = map[string]struct{ set, clr uint64 }{
	"ro":          {set: unix.MOUNT_ATTR_RDONLY},
	"rw":          {clr: unix.MOUNT_ATTR_RDONLY},
	"nosuid":      {set: unix.MOUNT_ATTR_NOSUID},
	"suid":        {clr: unix.MOUNT_ATTR_NOSUID},
	"nodev":       {set: unix.MOUNT_ATTR_NODEV},
	"dev":         {clr: unix.MOUNT_ATTR_NODEV},
	"noexec":      {set: unix.MOUNT_ATTR_NOEXEC},
	"exec":        {clr: unix.MOUNT_ATTR_NOEXEC},
	"nodiratime":  {set: unix.MOUNT_ATTR_NODIRATIME},
	"diratime":    {clr: unix.MOUNT_ATTR_NODIRATIME},
	"relatime":    {set: unix.MOUNT_ATTR_RELATIME, clr: unix.MOUNT_ATTR__ATIME},
	"noatime":     {set: unix.MOUNT_ATTR_NOATIME, clr: unix.MOUNT_ATTR__ATIME},
	"strictatime": {set: unix.MOUNT_ATTR_STRICTATIME, clr: unix.MOUNT_ATTR__ATIME},
	"nosymfollow": {set: unix.MOUNT_ATTR_NOSYMFOLLOW},
	"symfollow":   {clr: unix.MOUNT_ATTR_NOSYMFOLLOW},
}

func parseMount(m mount.Mount) (*mountSpec, error) {
	s := &mountSpec{fstype: m.Type, source: m.Source, bind: m.Type == "bind" || m.Type == "rbind", recursive: m.Type == "rbind"}
	if m.Target != "" {
		return nil, fmt.Errorf("mount %s of %s at %q: only a whole view can be mounted", m.Type, m.Source, m.Target)
	}
	for _, opt := range m.Options {
		key, value, _ := strings.Cut(opt, "=")
		a, isAttr := attrs[opt]
		switch {
		case isAttr:
			s.set = s.set&^(a.clr|a.set) | a.set
			s.clr = s.clr&^a.set | a.clr
		case opt == "bind":
			s.bind = true
		case opt == "rbind":
			s.bind, s.recursive = true, true
		case opt == "" || opt == "defaults":
		case m.Type == "overlay" && key == "lowerdir":
			s.lower = splitLayers(value)
		case m.Type == "overlay" && key == "upperdir":
			s.upper = value
		case m.Type == "overlay" && key == "workdir":
			s.work = value
		default:
			s.data = append(s.data, opt)
		}
	}
	switch {
	case s.bind && len(s.data) > 0:
		return nil, fmt.Errorf("bind of %s: unknown options %q", m.Source, s.data)
	case s.bind && s.source == "":
		return nil, fmt.Errorf("bind without a source")
	case !s.bind && s.fstype == "":
		return nil, fmt.Errorf("mount of %s without a type", m.Source)
	}
	return s, nil
}

// splitLayers splits at colons that no backslash protects.
func splitLayers(value string) []string {
	var out []string
	var b strings.Builder
	for i := 0; i < len(value); i++ {
		switch c := value[i]; {
		case c == '\\' && i+1 < len(value):
			i++
			b.WriteByte(value[i])
		case c == ':':
			out = append(out, b.String())
			b.Reset()
		default:
			b.WriteByte(c)
		}
	}
	return append(out, b.String())
}

// String names the mount for errors.
func (s *mountSpec) String() string {
	switch {
	case s.bind:
		return "bind of " + s.source
	case s.fstype == "overlay" && s.upper != "":
		return fmt.Sprintf("overlay of %d layers with upper %s", len(s.lower)+1, s.upper)
	case s.fstype == "overlay" && len(s.lower) > 0:
		return fmt.Sprintf("overlay of %d layers up to %s", len(s.lower), s.lower[0])
	}
	return s.fstype
}
