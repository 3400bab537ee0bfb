package worker

import (
	"fmt"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"golang.org/x/sys/unix"
)

// GC says how the cache is kept within bounds. The zero value is the default.
type GC struct {
	Off bool
	// What the default rules keep; with none set, shares of the disk.
	Reserved, MaxUsed, MinFree DiskSpace
	Rules                      []GCRule // nil: the default ones
}

// GCRule says what may go; the rules are applied one after the other. With a
// space target the least useful records go until it is met, without one all
// that match.
type GCRule struct {
	All          bool // internal and frontend records too
	Filters      []string
	KeepDuration time.Duration // what was used within it stays

	Reserved DiskSpace // the cache isn't made smaller than this
	MaxUsed  DiskSpace // nor left bigger
	MinFree  DiskSpace // of the disk
}

// DiskSpace is bytes, or a share of the disk if Bytes is 0.
type DiskSpace struct {
	Bytes   int64
	Percent int64
}

const (
	gigabyte = 1e9
	gibibyte = 1 << 30
)

// of is the space on a disk of total bytes. A share is rounded up to gigabytes,
// with buildkitd's idea of those, so that both show the same (DMN-097).
func (d DiskSpace) of(total int64) int64 {
	if d.Bytes != 0 || d.Percent == 0 {
		return d.Bytes
	}
	return (total*d.Percent/100/gibibyte + 1) * gigabyte
}

// rules are what the garbage collector applies to the cache in
// root, none if it is off. The disk is the one that holds root.
func (g GC) rules(root string) ([]cache.PruneOptions, error) {
	if g.Off {
		return nil, nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(root, &st); err != nil {
		return nil, fmt.Errorf("size of the disk that holds %s: %w", root, err)
	}
	return g.rulesOn(int64(st.Blocks) * st.Bsize), nil
}

func (g GC) rulesOn(disk int64) []cache.PruneOptions {
	rules := g.Rules
	if len(rules) == 0 {
		rules = g.defaults(disk)
	}
	out := make([]cache.PruneOptions, len(rules))
	for i, r := range rules {
		out[i] = cache.PruneOptions{
			Filters: r.Filters, All: r.All, KeepDuration: r.KeepDuration,
			ReservedSpace: r.Reserved.of(disk), MaxUsedSpace: r.MaxUsed.of(disk), MinFreeSpace: r.MinFree.of(disk),
			Rule: fmt.Sprintf("gc rule#%d", i), // as clients number them
		}
	}
	return out
}

// defaults are buildkitd's (DMN-090 to -094).
func (g GC) defaults(disk int64) []GCRule {
	reserved, maxUsed, minFree := g.Reserved, g.MaxUsed, g.MinFree
	if reserved == (DiskSpace{}) && maxUsed == (DiskSpace{}) && minFree == (DiskSpace{}) {
		reserved.Bytes = min(DiskSpace{Percent: 10}.of(disk), 10*gigabyte)
		maxUsed.Bytes = min(DiskSpace{Percent: 80}.of(disk), 100*gigabyte)
		minFree.Percent = 20
	}
	const day = 24 * time.Hour
	return []GCRule{
		{ // what is quickly made again
			Filters:      []string{"type==source.local", "type==exec.cachemount", "type==source.git.checkout"},
			KeepDuration: 2 * day, MaxUsed: DiskSpace{Bytes: 512e6},
		},
		{KeepDuration: 60 * day, Reserved: reserved, MaxUsed: maxUsed, MinFree: minFree},
		{Reserved: reserved, MaxUsed: maxUsed, MinFree: minFree},
		{All: true, Reserved: reserved, MaxUsed: maxUsed, MinFree: minFree},
	}
}
