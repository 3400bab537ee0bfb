package main

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/docker/go-units"
	"github.com/kilnbuild/kiln/worker"
	"github.com/urfave/cli/v3"
)

// gcConfig are the keys of garbage collection (DMN-043). Sizes are read by
// parseSpace.
type gcConfig struct {
	GC            *bool      `toml:"gc"`
	KeepStorage   any        `toml:"gckeepstorage"` // the old name of reservedSpace
	ReservedSpace any        `toml:"reservedSpace"`
	MaxUsedSpace  any        `toml:"maxUsedSpace"`
	MinFreeSpace  any        `toml:"minFreeSpace"`
	Policies      []gcPolicy `toml:"gcpolicy"`

	flag *keepStorage // --oci-worker-gc-keepstorage
}

// gcPolicy is one rule (DMN-044).
type gcPolicy struct {
	All           bool     `toml:"all"`
	Filters       []string `toml:"filters"`
	KeepDuration  any      `toml:"keepDuration"`  // read by parseDuration
	KeepBytes     any      `toml:"keepBytes"`     // the old name of reservedSpace
	ReservedSpace any      `toml:"reservedSpace"` // these are read by parseSpace
	MaxUsedSpace  any      `toml:"maxUsedSpace"`
	MinFreeSpace  any      `toml:"minFreeSpace"`
}

// keepStorage is the flag's value.
type keepStorage struct{ reserved, minFree, maxUsed worker.DiskSpace }

// applyFlags lets the flags override the keys.
func (g *gcConfig) applyFlags(c *cli.Command) (warnings []string, err error) {
	const gc, keep = "oci-worker-gc", "oci-worker-gc-keepstorage"
	if c.IsSet(gc) {
		on := c.Bool(gc)
		g.GC = &on
	}
	text := c.String(keep)
	if text == "" {
		return nil, nil
	}
	if g.flag, err = parseKeepStorage(text); err != nil {
		return nil, fmt.Errorf("--%s: %w", keep, err)
	}
	if len(g.Policies) > 0 {
		warnings = append(warnings, fmt.Sprintf("flag --%s has no effect: gcpolicy in the config file says what is kept", keep))
	}
	return warnings, nil
}

// parseKeepStorage reads "reserved[,free[,max]]", in megabytes (DMN-017).
func parseKeepStorage(text string) (*keepStorage, error) {
	parts := strings.Split(text, ",")
	var k keepStorage
	into := []*worker.DiskSpace{&k.reserved, &k.minFree, &k.maxUsed}
	if len(parts) > len(into) {
		return nil, fmt.Errorf("%q has %d numbers; it must be reserved[,free[,max]], in megabytes", text, len(parts))
	}
	for i, part := range parts {
		n, err := strconv.ParseInt(strings.TrimSpace(part), 10, 64)
		if err != nil || n < 0 || n > 1e12 {
			return nil, fmt.Errorf("%q is not a number of megabytes; it must be reserved[,free[,max]]", part)
		}
		into[i].Bytes = n * 1e6
	}
	return &k, nil
}

// read checks the keys and turns them into what the worker wants.
func (g *gcConfig) read(section string) (worker.GC, error) {
	out := worker.GC{Off: g.GC != nil && !*g.GC}
	var old worker.DiskSpace
	if err := parseSpaces(section, map[string]spaceKey{
		"gckeepstorage": {g.KeepStorage, &old}, "reservedSpace": {g.ReservedSpace, &out.Reserved},
		"maxUsedSpace": {g.MaxUsedSpace, &out.MaxUsed}, "minFreeSpace": {g.MinFreeSpace, &out.MinFree},
	}); err != nil {
		return out, err
	}
	if f := g.flag; f != nil {
		out.Reserved, out.MinFree, out.MaxUsed = f.reserved, f.minFree, f.maxUsed
	} else if zero := (worker.DiskSpace{}); out.Reserved == zero && out.MaxUsed == zero && out.MinFree == zero {
		out.Reserved = old // (DMN-095)
	}
	for i, p := range g.Policies {
		rule, err := p.read(fmt.Sprintf("%s.gcpolicy[%d]", section, i))
		if err != nil {
			return out, err
		}
		out.Rules = append(out.Rules, rule)
	}
	return out, nil
}

func (p *gcPolicy) read(section string) (worker.GCRule, error) {
	out := worker.GCRule{All: p.All, Filters: p.Filters}
	if _, err := filters.ParseAll(p.Filters...); err != nil {
		return out, fmt.Errorf("%s.filters %q: %w", section, p.Filters, err)
	}
	if p.KeepDuration != nil && p.KeepDuration != "" {
		var err error
		if out.KeepDuration, err = parseDuration(section+".keepDuration", p.KeepDuration); err != nil {
			return out, err
		}
	}
	var old worker.DiskSpace
	err := parseSpaces(section, map[string]spaceKey{
		"keepBytes": {p.KeepBytes, &old}, "reservedSpace": {p.ReservedSpace, &out.Reserved},
		"maxUsedSpace": {p.MaxUsedSpace, &out.MaxUsed}, "minFreeSpace": {p.MinFreeSpace, &out.MinFree},
	})
	if out.Reserved == (worker.DiskSpace{}) {
		out.Reserved = old
	}
	return out, err
}

// spaceKey is the value of a key and where it goes.
type spaceKey struct {
	value any
	into  *worker.DiskSpace
}

func parseSpaces(section string, keys map[string]spaceKey) error {
	for _, name := range slices.Sorted(maps.Keys(keys)) {
		k := keys[name]
		var err error
		if *k.into, err = parseSpace(section+"."+name, k.value); err != nil {
			return err
		}
	}
	return nil
}

// parseSpace reads bytes, a size such as 512MB, or a share of the disk such as
// 10% (DMN-049). nil is none.
func parseSpace(key string, value any) (worker.DiskSpace, error) {
	if value == nil || value == "" {
		return worker.DiskSpace{}, nil
	}
	text := strings.TrimSpace(fmt.Sprint(value))
	if share, ok := strings.CutSuffix(text, "%"); ok {
		n, err := strconv.ParseInt(share, 10, 64)
		if err != nil || n < 0 || n > 100 {
			return worker.DiskSpace{}, fmt.Errorf("%s: %q is not a share of the disk from 0%% to 100%%", key, text)
		}
		return worker.DiskSpace{Percent: n}, nil
	}
	n, err := units.RAMInBytes(text)
	if err != nil || n < 0 {
		return worker.DiskSpace{}, fmt.Errorf("%s: %q is neither a number of bytes, nor a size such as 512MB, nor a share of the disk such as 10%%", key, text)
	}
	return worker.DiskSpace{Bytes: n}, nil
}

// parseBytes is parseSpace for what can't be a share of the disk.
func parseBytes(key string, value any) (int64, error) {
	space, err := parseSpace(key, value)
	if err == nil && space.Percent > 0 {
		err = fmt.Errorf("%s: %q is a share of the disk; give a number of bytes, or a size such as 512MB", key, value)
	}
	return space.Bytes, err
}
