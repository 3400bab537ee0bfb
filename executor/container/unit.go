//go:build linux && (amd64 || arm64)

package container

import (
	"context"
	"errors"
	"fmt"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Units is a systemd, which owns the machine's cgroups where it runs. A
// container is a transient unit of it: a scope with the container's cgroup,
// which is delegated to this runtime.
type Units interface {
	// Start makes a unit with a process in it.
	Start(ctx context.Context, u Unit) error
	// Set changes the limits that systemd knows of, so that it doesn't take them
	// back when it is reloaded.
	Set(ctx context.Context, name string, v2 bool, r *specs.LinuxResources) error
	// Stop removes a unit, which may be gone already.
	Stop(ctx context.Context, name string) error
	Close()
}

// Unit is what a container is for systemd.
type Unit struct {
	Name, Slice, Description string
	Pid                      int
	V2                       bool // its cgroup is of version 2
	Resources                *specs.LinuxResources
	// Annotations of the spec; those that begin with org.systemd.property. are
	// further properties.
	Annotations map[string]string
}

// parseUnit takes a cgroupsPath apart that is for systemd: slice:prefix:name.
func parseUnit(path, id string) (slice, unit string, err error) {
	slice, prefix, name := "", "kilnrun", id
	if path != "" {
		parts := strings.Split(path, ":")
		if len(parts) != 3 || parts[2] == "" {
			return "", "", fmt.Errorf("linux.cgroupsPath %q: with --systemd-cgroup it is slice:prefix:name", path)
		}
		slice, prefix, name = parts[0], parts[1], parts[2]
	}
	if slice == "" {
		slice = "system.slice"
	}
	if strings.HasSuffix(name, ".slice") {
		return "", "", fmt.Errorf("linux.cgroupsPath %q: a container can't be a slice itself", path)
	}
	if strings.Contains(name+prefix, "/") {
		return "", "", fmt.Errorf("linux.cgroupsPath %q: the name of a unit has no slash", path)
	}
	if prefix != "" {
		name = prefix + "-" + name
	}
	return slice, name + ".scope", nil
}

// sliceDir is where the cgroup of a slice is: a-b.slice is below a.slice.
func sliceDir(slice string) (string, error) {
	name, ok := strings.CutSuffix(slice, ".slice")
	if !ok || name == "" || strings.Contains(slice, "/") {
		return "", fmt.Errorf("linux.cgroupsPath: %q is not the name of a slice, such as system.slice", slice)
	}
	if name == "-" {
		return "/", nil
	}
	dir, prefix := "", ""
	for part := range strings.SplitSeq(name, "-") {
		if part == "" {
			return "", fmt.Errorf("linux.cgroupsPath: %q is not the name of a slice: it has an empty part", slice)
		}
		prefix += part
		dir += "/" + prefix + ".slice"
		prefix += "-"
	}
	return dir, nil
}

// inUnit calls do with the machine's systemd.
func (c *Container) inUnit(ctx context.Context, do func(Units) error) error {
	if c.Unit == "" {
		return nil
	}
	if c.systemd == nil {
		return fmt.Errorf("container %s is unit %s of systemd, which this program doesn't use", c.ID, c.Unit)
	}
	units, err := c.systemd(ctx)
	if err != nil {
		return err
	}
	defer units.Close()
	return do(units)
}

// startUnit has systemd make the container's cgroup, around its process.
func (c *Container) startUnit(ctx context.Context) error {
	return c.inUnit(ctx, func(units Units) error {
		c.started = true
		return units.Start(ctx, Unit{
			Name: c.Unit, Slice: c.Slice, Description: "container " + c.ID, Pid: c.Pid, V2: c.Groups.V2 != "", Resources: c.Spec.Linux.Resources, Annotations: c.Spec.Annotations,
		})
	})
}

func (c *Container) stopUnit(ctx context.Context) error {
	return c.inUnit(ctx, func(units Units) error { return units.Stop(ctx, c.Unit) })
}

// cgroupsPath says where the container's cgroups belong, as newGroups wants it.
func (c *Container) cgroupsPath(systemd bool) (string, error) {
	path := c.Spec.Linux.CgroupsPath
	if !systemd {
		return path, nil
	}
	if c.systemd == nil {
		return "", errors.New("cgroups of systemd: this program doesn't use it")
	}
	var err error
	if c.Slice, c.Unit, err = parseUnit(path, c.ID); err != nil {
		return "", err
	}
	dir, err := sliceDir(c.Slice)
	return strings.TrimSuffix(dir, "/") + "/" + c.Unit, err
}
