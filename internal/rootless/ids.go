package rootless

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
)

// Range maps Count ids from Inside on, as the namespace's processes see them, to
// those from Outside on.
type Range struct{ Inside, Outside, Count uint32 }

// Namespace is a user namespace.
type Namespace struct {
	UIDs, GIDs []Range
}

// all is how many ids there are: 2^32-1 is none.
const all = 1<<32 - 1

// Here is the user namespace that this process is in. It doesn't change once
// Enter has returned.
func Here() *Namespace { return here() }

var here = sync.OnceValue(func() *Namespace {
	return &Namespace{UIDs: readMap("/proc/self/uid_map"), GIDs: readMap("/proc/self/gid_map")}
})

// readMap reads a map of ids. Without one, as on kernels without user
// namespaces, each id is what it is.
func readMap(file string) []Range {
	data, err := os.ReadFile(file)
	if err != nil {
		return []Range{{Count: all}}
	}
	return parseMap(string(data))
}

func parseMap(text string) (ranges []Range) {
	for line := range strings.Lines(text) {
		var r Range
		if _, err := fmt.Sscan(line, &r.Inside, &r.Outside, &r.Count); err == nil {
			ranges = append(ranges, r)
		}
	}
	slices.SortFunc(ranges, func(a, b Range) int { return int(int64(a.Inside) - int64(b.Inside)) })
	return ranges
}

// Mapped says whether root here isn't root of the machine.
func (n *Namespace) Mapped() bool {
	return !slices.Equal(n.UIDs, []Range{{Count: all}})
}

// HasUID says whether files can belong to the user here.
func (n *Namespace) HasUID(id uint32) bool { return contains(n.UIDs, id) }

// HasGID says whether files can belong to the group here.
func (n *Namespace) HasGID(id uint32) bool { return contains(n.GIDs, id) }

func contains(ranges []Range, id uint32) bool {
	return slices.ContainsFunc(ranges, func(r Range) bool { return id >= r.Inside && id-r.Inside < r.Count })
}

// Explain is err of giving a file to uid and gid, with the cause if that is an
// id that isn't mapped. No error stays none.
func (n *Namespace) Explain(err error, uid, gid int) error {
	if err == nil || !n.Mapped() {
		return err
	}
	for _, id := range []struct {
		kind, file string
		n          int
		ranges     []Range
	}{{"user", "/etc/subuid", uid, n.UIDs}, {"group", "/etc/subgid", gid, n.GIDs}} {
		if id.n >= 0 && !contains(id.ranges, uint32(id.n)) {
			return fmt.Errorf("%w: %s %d is outside the ids that this rootless daemon has, %s; a larger range in %s gives it more", err, id.kind, id.n, inside(id.ranges), id.file)
		}
	}
	return err
}

// Ranges says which ids there are.
func (n *Namespace) Ranges() string {
	users, groups := inside(n.UIDs), inside(n.GIDs)
	if users == groups {
		return users
	}
	return "users " + users + " and groups " + groups
}

// inside lists the ids of ranges, those that follow each other as one.
func inside(ranges []Range) string {
	var parts []string
	for i := 0; i < len(ranges); {
		first, last := ranges[i].Inside, ranges[i].Inside+ranges[i].Count-1
		for i++; i < len(ranges) && ranges[i].Inside == last+1; i++ {
			last += ranges[i].Count
		}
		parts = append(parts, fmt.Sprintf("%d to %d", first, last))
	}
	return strings.Join(parts, ", ")
}

// String is one line for each range, users first.
func (n *Namespace) String() string {
	var b strings.Builder
	for _, kind := range []struct {
		name   string
		ranges []Range
	}{{"uid", n.UIDs}, {"gid", n.GIDs}} {
		for _, r := range kind.ranges {
			fmt.Fprintf(&b, "%s %d %d %d\n", kind.name, r.Inside, r.Outside, r.Count)
		}
	}
	return b.String()
}
