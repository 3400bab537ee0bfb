//go:build linux && (amd64 || arm64)

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/docker/go-units"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/urfave/cli/v3"
)

// limit is a flag of update.
type limit struct {
	name, usage string
	set         func(r *specs.LinuxResources, text string) error
}

var limits = []limit{
	{"blkio-weight", "I/O weight, 10 to 1000", func(r *specs.LinuxResources, text string) error {
		n, err := strconv.ParseUint(text, 10, 16)
		w := uint16(n)
		r.BlockIO = &specs.LinuxBlockIO{Weight: &w}
		return err
	}},
	{"cpu-period", "CFS period in µs", unsigned(func(r *specs.LinuxResources, n *uint64) { r.CPU.Period = n })},
	{"cpu-quota", "CPU time in each period, in µs", signed(func(r *specs.LinuxResources, n *int64) { r.CPU.Quota = n })},
	{"cpu-share", "relative weight", unsigned(func(r *specs.LinuxResources, n *uint64) { r.CPU.Shares = n })},
	{"cpu-rt-period", "real-time period in µs", unsigned(func(r *specs.LinuxResources, n *uint64) { r.CPU.RealtimePeriod = n })},
	{"cpu-rt-runtime", "real-time CPU time in each period, in µs", signed(func(r *specs.LinuxResources, n *int64) { r.CPU.RealtimeRuntime = n })},
	{"cpuset-cpus", "processors to use", func(r *specs.LinuxResources, text string) error { r.CPU.Cpus = text; return nil }},
	{"cpuset-mems", "memory nodes to use", func(r *specs.LinuxResources, text string) error { r.CPU.Mems = text; return nil }},
	{"memory", "memory in bytes", bytesOf(func(r *specs.LinuxResources, n *int64) { r.Memory.Limit = n })},
	{"memory-reservation", "memory that is protected, in bytes", bytesOf(func(r *specs.LinuxResources, n *int64) { r.Memory.Reservation = n })},
	{"memory-swap", "memory and swap together in bytes, -1 is unlimited", bytesOf(func(r *specs.LinuxResources, n *int64) { r.Memory.Swap = n })},
	{"pids-limit", "how many processes", signed(func(r *specs.LinuxResources, n *int64) { r.Pids = &specs.LinuxPids{Limit: n} })},
}

func unsigned(set func(*specs.LinuxResources, *uint64)) func(*specs.LinuxResources, string) error {
	return func(r *specs.LinuxResources, text string) error {
		n, err := strconv.ParseUint(text, 10, 64)
		set(r, &n)
		return err
	}
}

func signed(set func(*specs.LinuxResources, *int64)) func(*specs.LinuxResources, string) error {
	return func(r *specs.LinuxResources, text string) error {
		n, err := strconv.ParseInt(text, 10, 64)
		set(r, &n)
		return err
	}
}

// bytesOf takes a number of bytes, with a unit or without.
func bytesOf(set func(*specs.LinuxResources, *int64)) func(*specs.LinuxResources, string) error {
	return func(r *specs.LinuxResources, text string) error {
		n, err := int64(-1), error(nil)
		if text != "-1" {
			n, err = units.RAMInBytes(text)
		}
		set(r, &n)
		return err
	}
}

// maxResources is how long a description of limits may be.
const maxResources = 1 << 20

// resourcesOf returns what update is to set.
func resourcesOf(c *cli.Command, stdin io.Reader) (*specs.LinuxResources, error) {
	r := &specs.LinuxResources{CPU: &specs.LinuxCPU{}, Memory: &specs.LinuxMemory{}}
	if file := c.String("resources"); file != "" {
		in := stdin
		if file != "-" {
			f, err := os.Open(file)
			if err != nil {
				return nil, fmt.Errorf("--resources: %w", err)
			}
			defer f.Close()
			in = f
		}
		if err := json.NewDecoder(io.LimitReader(in, maxResources)).Decode(r); err != nil {
			return nil, fmt.Errorf("--resources %s: %w", file, err)
		}
		return r, nil
	}
	for _, l := range limits {
		if !c.IsSet(l.name) {
			continue
		}
		if err := l.set(r, c.String(l.name)); err != nil {
			return nil, fmt.Errorf("--%s %q: %w", l.name, c.String(l.name), err)
		}
	}
	return r, nil
}
