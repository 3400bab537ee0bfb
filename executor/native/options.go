//go:build linux && (amd64 || arm64)

package native

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// mountOptions are the options of a mount in a spec, taken apart.
type mountOptions struct {
	flags       uintptr // MS_*, for file systems
	data        []string
	bind, rec   bool
	propagation []uintptr // MS_*, in order
	// Attributes of a bind's mount, and those of all mounts below it, too.
	set, clear       uint64
	setRec, clearRec uint64
	idmap, idmapRec  bool // ids are mapped even if the mount itself says nothing; and those of mounts below it
	copyUp           bool
}

type mountOption struct {
	set, clear uintptr // MS_*
	attr       uint64  // MOUNT_ATTR_*
	off        bool    // clears attr
}

var mountOptionTable = map[string]mountOption{
	"defaults":      {},
	"ro":            {set: unix.MS_RDONLY, attr: unix.MOUNT_ATTR_RDONLY},
	"rw":            {clear: unix.MS_RDONLY, attr: unix.MOUNT_ATTR_RDONLY, off: true},
	"nosuid":        {set: unix.MS_NOSUID, attr: unix.MOUNT_ATTR_NOSUID},
	"suid":          {clear: unix.MS_NOSUID, attr: unix.MOUNT_ATTR_NOSUID, off: true},
	"nodev":         {set: unix.MS_NODEV, attr: unix.MOUNT_ATTR_NODEV},
	"dev":           {clear: unix.MS_NODEV, attr: unix.MOUNT_ATTR_NODEV, off: true},
	"noexec":        {set: unix.MS_NOEXEC, attr: unix.MOUNT_ATTR_NOEXEC},
	"exec":          {clear: unix.MS_NOEXEC, attr: unix.MOUNT_ATTR_NOEXEC, off: true},
	"nodiratime":    {set: unix.MS_NODIRATIME, attr: unix.MOUNT_ATTR_NODIRATIME},
	"diratime":      {clear: unix.MS_NODIRATIME, attr: unix.MOUNT_ATTR_NODIRATIME, off: true},
	"noatime":       {set: unix.MS_NOATIME, attr: unix.MOUNT_ATTR_NOATIME},
	"atime":         {clear: unix.MS_NOATIME, attr: unix.MOUNT_ATTR_NOATIME, off: true},
	"strictatime":   {set: unix.MS_STRICTATIME, attr: unix.MOUNT_ATTR_STRICTATIME},
	"nostrictatime": {clear: unix.MS_STRICTATIME, attr: unix.MOUNT_ATTR_STRICTATIME, off: true},
	"nosymfollow":   {set: unix.MS_NOSYMFOLLOW, attr: unix.MOUNT_ATTR_NOSYMFOLLOW},
	"symfollow":     {clear: unix.MS_NOSYMFOLLOW, attr: unix.MOUNT_ATTR_NOSYMFOLLOW, off: true},
	"relatime":      {set: unix.MS_RELATIME},
	"norelatime":    {clear: unix.MS_RELATIME},
	"sync":          {set: unix.MS_SYNCHRONOUS},
	"async":         {clear: unix.MS_SYNCHRONOUS},
	"dirsync":       {set: unix.MS_DIRSYNC},
	"mand":          {set: unix.MS_MANDLOCK},
	"nomand":        {clear: unix.MS_MANDLOCK},
	"silent":        {set: unix.MS_SILENT},
	"loud":          {clear: unix.MS_SILENT},
	"iversion":      {set: unix.MS_I_VERSION},
	"noiversion":    {clear: unix.MS_I_VERSION},
	"lazytime":      {set: unix.MS_LAZYTIME},
}

var propagations = map[string]uintptr{
	"private": unix.MS_PRIVATE, "rprivate": unix.MS_PRIVATE | unix.MS_REC, "shared": unix.MS_SHARED, "rshared": unix.MS_SHARED | unix.MS_REC,
	"slave": unix.MS_SLAVE, "rslave": unix.MS_SLAVE | unix.MS_REC, "unbindable": unix.MS_UNBINDABLE, "runbindable": unix.MS_UNBINDABLE | unix.MS_REC,
}

func parseMountOptions(fstype string, options []string) (o mountOptions, err error) {
	o.bind = fstype == "bind"
	for _, name := range options {
		switch p, isPropagation := propagations[name]; {
		case name == "bind", name == "rbind":
			o.bind, o.rec = true, name == "rbind"
			continue
		case isPropagation:
			o.propagation = append(o.propagation, p)
			continue
		}
		switch {
		case name == "tmpcopyup":
			o.copyUp = true
			continue
		case o.setIDMap(name):
			continue
		case strings.HasPrefix(name, "idmap="), strings.HasPrefix(name, "ridmap="):
			return o, fmt.Errorf("mount option %q: ids are mapped by uidMappings and gidMappings of the mount", name)
		}
		if m, ok := mountOptionTable[name]; ok {
			o.flags = o.flags&^m.clear | m.set
			addAttr(m, &o.set, &o.clear)
			continue
		}
		if m, ok := mountOptionTable[strings.TrimPrefix(name, "r")]; ok && m.attr != 0 {
			addAttr(m, &o.setRec, &o.clearRec)
			continue
		}
		o.data = append(o.data, name)
	}
	return o, nil
}

// addAttr notes an attribute; of two that contradict each other the last wins.
func addAttr(m mountOption, set, clear *uint64) {
	if m.off {
		*set &^= m.attr
		*clear |= m.attr
		return
	}
	*set |= m.attr
	*clear &^= m.attr
}

// setAttrs applies what o says of a bind to the detached mount fd.
func (o mountOptions) setAttrs(fd int) error {
	for _, a := range []struct {
		set, clear uint64
		flags      uint
	}{{o.set, o.clear, 0}, {o.setRec, o.clearRec, unix.AT_RECURSIVE}} {
		// All kinds of access times are one field of which zero is a value.
		const atimes = unix.MOUNT_ATTR_NOATIME | unix.MOUNT_ATTR_STRICTATIME
		if (a.set|a.clear)&atimes != 0 {
			a.clear = a.clear&^atimes | unix.MOUNT_ATTR__ATIME
		}
		if a.set|a.clear == 0 {
			continue
		}
		attr := unix.MountAttr{Attr_set: a.set, Attr_clr: a.clear}
		if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|a.flags, &attr); err != nil {
			return fmt.Errorf("set mount attributes: %w", err)
		}
	}
	return nil
}

// MountOptions lists the options that this runtime knows itself; all others
// are for file systems.
func MountOptions() []string {
	list := append([]string{"bind", "rbind", "tmpcopyup"}, idmapOptions...)
	for name := range propagations {
		list = append(list, name)
	}
	for name, o := range mountOptionTable {
		list = append(list, name)
		if o.attr != 0 {
			list = append(list, "r"+name)
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// Capabilities lists the names of capabilities that a process can have.
func Capabilities() []string { return slices.Sorted(maps.Keys(capNumbers())) }
