//go:build e2e

package runtimes

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func ptr[T any](v T) *T { return &v }

func makeFifo(name string) error { return unix.Mkfifo(name, 0o666) }

// newShared makes what mounts come from.
func newShared(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "sub"), 0o755), os.WriteFile(filepath.Join(dir, "file"), []byte("shared\n"), 0o644),
		os.WriteFile(filepath.Join(dir, "sub/deep"), nil, 0o600), os.Chown(filepath.Join(dir, "sub/deep"), 1000, 1000)); err != nil {
		t.Fatal(err)
	}
	return dir
}

func caps(names ...string) *specs.LinuxCapabilities {
	return &specs.LinuxCapabilities{Bounding: names, Effective: names, Permitted: names}
}

func without(s *specs.Spec, kind specs.LinuxNamespaceType) {
	s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == kind })
}

// mapped gives the container a user namespace, and the root file system to its
// root.
func mapped(s *specs.Spec, b *bundle) {
	const first = 100000
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace})
	s.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: first, Size: 65536}}
	s.Linux.GIDMappings = s.Linux.UIDMappings
	if err := filepath.Walk(b.root(""), func(name string, info os.FileInfo, err error) error {
		if err != nil || info.Name() == "probe" {
			return err
		}
		return os.Lchown(name, first, first)
	}); err != nil {
		b.Fatal(err)
	}
}

func mount(s *specs.Spec, m ...specs.Mount) { s.Mounts = append(s.Mounts, m...) }

// setMount changes the options of a mount that is there.
func setMount(s *specs.Spec, dest string, change func(m *specs.Mount)) {
	for i := range s.Mounts {
		if s.Mounts[i].Destination == dest {
			change(&s.Mounts[i])
		}
	}
}

func device(path, kind string, major, minor int64) specs.LinuxDevice {
	return specs.LinuxDevice{Path: path, Type: kind, Major: major, Minor: minor}
}

// calls are facts about system calls, whose numbers aren't the same everywhere.
var calls = struct{ getpriority, personality, umask string }{
	fmt.Sprintf("call:%d", unix.SYS_GETPRIORITY), fmt.Sprintf("call:%d", unix.SYS_PERSONALITY), fmt.Sprintf("call:%d", unix.SYS_UMASK),
}

// sleeper is a process in namespaces of its own, for a container to join them.
func sleeper(b *bundle, flags uintptr) (namespaces string) {
	b.Helper()
	return started(b, &syscall.SysProcAttr{Cloneflags: flags})
}

// sleeperMapped is one in a user namespace.
func sleeperMapped(b *bundle, ids []specs.LinuxIDMapping) (namespaces string) {
	b.Helper()
	var list []syscall.SysProcIDMap
	for _, m := range ids {
		list = append(list, syscall.SysProcIDMap{ContainerID: int(m.ContainerID), HostID: int(m.HostID), Size: int(m.Size)})
	}
	return started(b, &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: list, GidMappings: list, GidMappingsEnableSetgroups: true})
}

func started(b *bundle, attr *syscall.SysProcAttr) (namespaces string) {
	b.Helper()
	cmd := exec.Command("/bin/sleep", "1000")
	attr.Pdeathsig = syscall.SIGKILL
	cmd.SysProcAttr = attr
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		cmd.Process.Kill() //nolint:errcheck // Wait tells
		cmd.Wait()         //nolint:errcheck // it was killed
	})
	return fmt.Sprintf("/proc/%d/ns/", cmd.Process.Pid)
}

// join makes the container join a namespace.
func join(s *specs.Spec, kind specs.LinuxNamespaceType, path string) {
	without(s, kind)
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: kind, Path: path})
}

// hook writes what it sees to a file of the bundle, and to one of the root file
// system if it runs in it.
func hook(b *bundle, name string) []specs.Hook {
	return []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "read state; echo " + name + ` $PWD $A >>"$0"`, b.root("log")}, Env: []string{"PATH=/bin:/usr/bin", "A=b"}}}
}

// below puts the container's cgroups into those of a parent, which is removed
// with the test: runtimes leave it.
func below(s *specs.Spec, b *bundle, parent string) {
	s.Linux.CgroupsPath = filepath.Join(parent, b.id)
	b.Cleanup(func() {
		own, err := os.ReadFile("/proc/self/cgroup")
		if err != nil {
			b.Fatal(err)
		}
		tops := []string{"/"}
		for line := range strings.Lines(string(own)) {
			if parts := strings.SplitN(strings.TrimSpace(line), ":", 3); len(parts) == 3 {
				tops = append(tops, parts[2])
			}
		}
		for _, top := range tops {
			for _, mount := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
				dirs, err := filepath.Glob(filepath.Join(mount, top, filepath.Base(parent)))
				for _, dir := range dirs {
					err = errors.Join(err, os.Remove(dir))
				}
				if err != nil {
					b.Error(err)
				}
			}
		}
	})
}
