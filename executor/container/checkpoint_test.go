//go:build linux && (amd64 || arm64)

package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// fakeCriu writes down what it is called with. To restore is to start another
// process.
func fakeCriu(t *testing.T, extra string) (program, calls string) {
	t.Helper()
	dir := t.TempDir()
	program, calls = filepath.Join(dir, "criu"), filepath.Join(dir, "calls")
	script := `#!/bin/sh
echo "$*" >>` + calls + `
` + extra + `
case $1 in restore)
	while [ $# -gt 0 ]; do case $1 in --pidfile) pid=$2;; --root) [ -e $2/bin/busybox ] || exit 9;; esac; shift; done
	exec /bin/busybox sleep 1000 >&3 2>&3 &
	echo $! >$pid
esac
`
	if err := os.WriteFile(program, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return program, calls
}

func read(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// What criu is called with, and what comes of it.
func TestCheckpoint(t *testing.T) {
	ctx := context.Background()
	// Restored processes are made by criu's child.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	defer unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
	program, calls := fakeCriu(t, "")
	bundle, spec := newBundle(t, "read x </wait")
	spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/data", Type: "bind", Source: "rootfs/bin", Options: []string{"rbind"}})
	const network = "/proc/self/ns/net"
	for i := range spec.Linux.Namespaces {
		if spec.Linux.Namespaces[i].Type == specs.NetworkNamespace {
			spec.Linux.Namespaces[i].Path = network
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(network, &st); err != nil {
		t.Fatal(err)
	}
	b := createBox(t, bundle, spec)
	images := filepath.Join(t.TempDir(), "images")
	o := Checkpoint{Criu: program, Images: images, LeaveRunning: true, FileLocks: true, ShellJob: true}
	if err := b.Save(ctx, o); err == nil || !strings.Contains(err.Error(), "it is created") {
		t.Errorf("checkpoint of a created one: %v", err)
	}
	b.start()
	if err := b.Save(ctx, o); err != nil {
		t.Fatal(err)
	}
	called := read(t, calls)
	for _, want := range []string{
		"dump --images-dir " + images + " --work-dir " + images, "--manage-cgroups=soft", "--file-locks", "--leave-running", fmt.Sprintf("--tree %d", b.p.Pid),
		"--root " + filepath.Join(bundle, "rootfs"), "--external mnt[/data]:/data", "--external mnt[/proc/keys]:/proc/keys",
		fmt.Sprintf("--external net[%d]:extRootNetNS", st.Ino),
	} {
		if !strings.Contains(called, want) {
			t.Errorf("criu is called with %s, want %s in it", called, want)
		}
	}
	if text := read(t, filepath.Join(images, descriptorsFile)); !strings.HasPrefix(text, `["/dev/null","/`) {
		t.Errorf("descriptors %s", text)
	}
	release(t, bundle)
	b.end()

	// As if it had written to a pipe.
	if err := os.WriteFile(filepath.Join(images, descriptorsFile), []byte(`["/dev/null","pipe:[5]","/dev/null"]`), 0o600); err != nil {
		t.Fatal(err)
	}
	stdio := [3]*os.File{b.out, b.out, b.out}
	id := b.ID + "-restored"
	c, p, err := b.r.Restore(ctx, id, spec, Options{IO: IO{Stdio: stdio}, Bundle: bundle}, Checkpoint{Criu: program, Images: images})
	if err != nil {
		t.Fatal(err)
	}
	called = read(t, calls)
	for _, want := range []string{"restore --images-dir " + images, "--restore-detached --restore-sibling", "--inherit-fd fd[3]:pipe:[5]", "--inherit-fd fd[4]:extRootNetNS", "--external mnt[/data]:" + filepath.Join(bundle, "rootfs/bin")} {
		if !strings.Contains(called, want) {
			t.Errorf("criu is called with %s, want %s in it", called, want)
		}
	}
	again, err := b.r.Load(id)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := again.Status(); err != nil || s != Running {
		t.Errorf("status %v, %v", s, err)
	}
	if pids, err := again.Processes(); err != nil || len(pids) != 1 || pids[0] != p.Pid {
		t.Errorf("processes %v, %v", pids, err)
	}
	if err := c.Delete(ctx, true); err != nil {
		t.Error(err)
	}
	if s, err := p.Wait(ctx, endTimeout); err != nil || s.Code() != 137 {
		t.Errorf("status %v, %v", s, err)
	}
}

// A restore that was killed leaves a mount of the root; to delete what it made
// doesn't delete the root.
func TestDeleteAfterKilledRestore(t *testing.T) {
	bundle, spec := newBundle(t, "")
	r := New(t.TempDir())
	c, err := r.reserve("killed")
	if err != nil {
		t.Fatal(err)
	}
	c.Spec, c.Bundle = spec, bundle
	if _, err := c.mountRoot(); err != nil {
		t.Fatal(err)
	}
	if err := c.Delete(context.Background(), true); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(bundle, "rootfs/bin/busybox")); err != nil {
		t.Errorf("the root is gone: %v", err)
	}
	if _, err := os.Stat(c.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the container's directory: %v", err)
	}
}

func TestCheckpointFails(t *testing.T) {
	ctx := context.Background()
	program, _ := fakeCriu(t, `[ $1 = restore ] || printf '(00.1) Error (cr-dump.c:1): no such thing\n(00.2) Warn\n(00.2) Error (cr-dump.c:2): failed\n' >$5/dump.log; exit 1`)
	bundle, spec := newBundle(t, "read x </wait")
	b := createBox(t, bundle, spec)
	b.start()
	if err := b.Save(ctx, Checkpoint{Criu: program, Images: t.TempDir(), ShellJob: true}); err == nil || !strings.Contains(err.Error(), "criu dump: exit status 1: (00.1) Error (cr-dump.c:1): no such thing; (00.2) Error (cr-dump.c:2): failed (its log is ") {
		t.Errorf("error %v", err)
	}
	if err := b.Save(ctx, Checkpoint{Criu: "/nonexist/criu", Images: t.TempDir(), ShellJob: true}); !errors.Is(err, exec.ErrNotFound) && !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "install the package criu") {
		t.Errorf("error %v", err)
	}
	if err := b.Save(ctx, Checkpoint{Criu: program, Images: t.TempDir()}); err == nil || !strings.Contains(err.Error(), "/out of the machine, which couldn't be restored") {
		t.Errorf("error %v", err)
	}
	b.Spec.Process.Terminal = true
	if err := b.Save(ctx, Checkpoint{Criu: program, Images: t.TempDir()}); err == nil || !strings.Contains(err.Error(), "has a terminal") {
		t.Errorf("error %v", err)
	}
	b.Spec.Process.Terminal = false
	id := b.ID + "-restored"
	if _, _, err := b.r.Restore(ctx, id, spec, Options{Bundle: bundle}, Checkpoint{Criu: program, Images: t.TempDir()}); err == nil || !strings.Contains(err.Error(), "has no checkpoint") {
		t.Errorf("error %v", err)
	}
	joined := *spec
	linux := *spec.Linux
	joined.Linux = &linux
	linux.Namespaces = []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.IPCNamespace, Path: "/proc/self/ns/ipc"}}
	if _, err := joinedNetwork(&joined); err == nil || !strings.Contains(err.Error(), "ipc namespace /proc/self/ns/ipc of others") {
		t.Errorf("error %v", err)
	}
	images := t.TempDir()
	if err := os.WriteFile(filepath.Join(images, descriptorsFile), []byte("[]"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := b.r.Restore(ctx, id, spec, Options{Bundle: bundle}, Checkpoint{Criu: program, Images: images}); err == nil || !strings.Contains(err.Error(), "criu restore: exit status 1") {
		t.Errorf("error %v", err)
	}
	if _, err := b.r.Load(id); !errors.Is(err, ErrNotExist) {
		t.Errorf("what couldn't be restored is left: %v", err)
	}
	release(t, bundle)
	b.end()
}
