//go:build linux && (amd64 || arm64)

package native

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const selinuxFS = "/sys/fs/selinux/"

// checkSELinux fails unless this machine's SELinux knows label.
func checkSELinux(label string) error {
	if _, err := os.Stat(selinuxFS + "enforce"); err != nil {
		return fmt.Errorf("SELinux is not enabled on this machine: %w", err)
	}
	own, err := ownLabel()
	if err != nil {
		return fmt.Errorf("look whether SELinux has a policy: %w", err)
	}
	if own == "kernel" { // which every process is without one
		return errors.New("SELinux has no policy on this machine, so it knows no labels")
	}
	f, err := os.OpenFile(selinuxFS+"context", os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString(label)
		f.Close()
	}
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("SELinux's policy on this machine has no such label: %w", err)
	}
	return nil // who may not ask learns it when the label is used
}

func ownLabel() (string, error) {
	own, err := os.ReadFile("/proc/thread-self/attr/current")
	return string(bytes.TrimRight(own, "\x00\n")), err
}

// seLabel has the program run under its SELinux label from its execve on, and
// keyrings that are made until then have the same.
func (b *builder) seLabel() error {
	label := b.spec.Process.SelinuxLabel
	if label == "" {
		return nil
	}
	err := checkSELinux(label)
	if err == nil {
		err = kernelsPolicy.mayExecute(label, b.spec.Process.NoNewPrivileges)
	}
	if err != nil {
		return fmt.Errorf("process.selinuxLabel %q: %w", label, err)
	}
	b.writeFile("SELinux label", "/proc/self/attr/exec", label)
	b.writeFile("SELinux label of keyrings", "/proc/self/attr/keycreate", label)
	return nil
}

// checkMountLabel fails if the files of mounts can't have the label that the
// spec gives them.
func (c *creator) checkMountLabel() error {
	label := c.spec.Linux.MountLabel
	if label == "" {
		return nil
	}
	if err := checkSELinux(label); err != nil {
		return fmt.Errorf("linux.mountLabel %q: %w", label, err)
	}
	return nil
}

// withLabel gives all files of a file system the spec's label. Those of the
// kernel's own file systems have what the policy says: it takes no other there.
func (c *creator) withLabel(fstype string, options []string) []string {
	label := c.spec.Linux.MountLabel
	if label == "" || slices.Contains([]string{"proc", "sysfs", "mqueue", "cgroup2"}, fstype) {
		return options
	}
	return append(slices.Clone(options), fmt.Sprintf("context=%q", label))
}

// labelMade labels what withLabel can't, as the kernel made it before it was
// mounted: the directory of message queues.
func (c *creator) labelMade(m specs.Mount, dest string) {
	if label := c.spec.Linux.MountLabel; label != "" && m.Type == "mqueue" {
		c.Call(dest+" label", unix.SYS_SETXATTR, c.String(dest), c.String("security.selinux"), c.String(label), uintptr(len(label)), 0)
	}
}
