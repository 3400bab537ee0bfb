//go:build linux && (amd64 || arm64)

package container

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/kilnbuild/kiln/executor/cgroup"
	"github.com/kilnbuild/kiln/executor/launch"
	"github.com/kilnbuild/kiln/internal/cleanup"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Restore makes the container id from a checkpoint of one with the same spec.
// Its processes go on where they were. Hooks aren't run.
func (r *Runtime) Restore(ctx context.Context, id string, spec *specs.Spec, o Options, from Checkpoint) (_ *Container, _ *Process, err error) {
	if o.Systemd {
		return nil, nil, errors.New("restore: a container in a unit of systemd isn't restored; leave --systemd-cgroup out")
	}
	if _, err := os.Stat(filepath.Join(from.Images, descriptorsFile)); err != nil {
		return nil, nil, fmt.Errorf("restore: %s has no checkpoint: %w", from.Images, err)
	}
	c, err := r.reserve(id)
	if err != nil {
		return nil, nil, err
	}
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	undo.Add(c.removeDir)
	c.Bundle, c.Spec, c.Created, c.Keyring = o.Bundle, spec, time.Now().UTC(), "_ses."+id
	if err := from.makeDirs(); err != nil {
		return nil, nil, err
	}
	tree, err := cgroup.Detect()
	if err != nil {
		return nil, nil, err
	}
	if c.Groups, err = newGroups(tree, spec.Linux.CgroupsPath, id); err != nil {
		return nil, nil, err
	}
	if err := c.save(); err != nil {
		return nil, nil, err
	}
	undo.Add(c.Groups.remove)
	if err := errors.Join(c.Groups.make(tree), c.confine()); err != nil {
		return nil, nil, err
	}
	p, err := c.restore(ctx, o, from, c.Groups.criuRoots(tree))
	if err != nil {
		return nil, nil, err
	}
	undo.Add(p.end)
	if _, c.StartTime, err = processStat(c.Pid); err != nil {
		return nil, nil, fmt.Errorf("look at restored process: %w", err)
	}
	if err := errors.Join(c.Groups.join(c.Pid, nil), c.save()); err != nil {
		return nil, nil, err
	}
	undo.Keep()
	return c, p, nil
}

// criuRoots has criu put processes into these groups, rather than into those that
// they were in.
func (g groups) criuRoots(tree *cgroup.Tree) (args []string) {
	below := func(dir string) string {
		for _, mount := range tree.Mounts() {
			if rest, ok := strings.CutPrefix(dir, mount+"/"); ok {
				return "/" + rest
			}
		}
		return "/"
	}
	if g.V2 != "" {
		return []string{"--cgroup-root", below(g.V2)}
	}
	for names, dir := range g.V1 {
		root := names + ":" + below(dir)
		if names == unified {
			root = below(dir)
		}
		args = append(args, "--cgroup-root", root)
	}
	return args
}

// restore has criu make the processes, the first of which is this one's child.
func (c *Container) restore(ctx context.Context, o Options, from Checkpoint, groups []string) (_ *Process, err error) {
	root, err := c.mountRoot()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unmountRoot(root)) }()
	pidFile := filepath.Join(c.dir, "criu.pid")
	args := []string{"--root", root, "--restore-detached", "--restore-sibling", "--pidfile", pidFile}
	args = append(args, groups...)
	for _, m := range c.external() {
		args = append(args, "--external", fmt.Sprintf("mnt[%s]:%s", m.Destination, m.Source))
	}
	inherited, files, err := inherit(from.Images, o.Stdio)
	if err != nil {
		return nil, err
	}
	network, err := joinedNetwork(c.Spec)
	if err != nil {
		return nil, err
	}
	if network != "" {
		f, err := os.Open(network)
		if err != nil {
			return nil, fmt.Errorf("restore: network namespace: %w", err)
		}
		defer f.Close()
		inherited = append(inherited, "--inherit-fd", fmt.Sprintf("fd[%d]:%s", firstExtra+len(files), networkKey))
		files = append(files, f)
	}
	if err := from.run(ctx, "restore", append(args, inherited...), files); err != nil {
		return nil, err
	}
	text, err := os.ReadFile(pidFile)
	if err != nil {
		return nil, fmt.Errorf("restore: %w", err)
	}
	if c.Pid, err = strconv.Atoi(strings.TrimSpace(string(text))); err != nil {
		return nil, fmt.Errorf("restore: %s: %w", pidFile, err)
	}
	child, err := launch.Child(c.Pid)
	if err != nil {
		return nil, fmt.Errorf("restore: %w", err)
	}
	return &Process{Process: child}, nil
}

// mountRoot mounts the root below the container's directory: criu wants a root
// that is a mount.
func (c *Container) mountRoot() (string, error) {
	dir := filepath.Join(c.dir, criuRoot)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", fmt.Errorf("restore: %w", err)
	}
	if err := unix.Mount(rootDir(c.Spec, c.Bundle), dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return "", fmt.Errorf("restore: mount %s: %w", rootDir(c.Spec, c.Bundle), err)
	}
	if err := unix.Mount("", dir, "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return "", errors.Join(fmt.Errorf("restore: make mount of root a slave: %w", err), unmountRoot(dir))
	}
	return dir, nil
}

const criuRoot = "criu-root"

// removeDir removes the container's directory, but not through a mount that a
// restore left in it because it was killed.
func (c *Container) removeDir() error {
	err := unix.Unmount(filepath.Join(c.dir, criuRoot), unix.MNT_DETACH)
	if err == nil || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) {
		err = os.RemoveAll(c.dir)
	}
	if err != nil {
		return fmt.Errorf("delete state of container %s: %w", c.ID, err)
	}
	return nil
}

func unmountRoot(dir string) error {
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("restore: unmount %s: %w", dir, err)
	}
	return os.Remove(dir)
}

// firstExtra is the number of the first file that a command inherits besides
// standard input and output.
const firstExtra = 3

// inherit has criu replace the pipes and files of the caller that standard
// input and output were by those that they are now.
func inherit(images string, stdio [3]*os.File) (args []string, files []*os.File, err error) {
	text, err := os.ReadFile(filepath.Join(images, descriptorsFile))
	if err != nil {
		return nil, nil, fmt.Errorf("restore: %w", err)
	}
	var links []string
	if err := json.Unmarshal(text, &links); err != nil {
		return nil, nil, fmt.Errorf("restore: %s: %w", filepath.Join(images, descriptorsFile), err)
	}
	for i, link := range links {
		if i >= len(stdio) || !strings.HasPrefix(link, "pipe:") {
			continue
		}
		args = append(args, "--inherit-fd", fmt.Sprintf("fd[%d]:%s", firstExtra+len(files), link))
		files = append(files, stdio[i])
	}
	return args, files, nil
}
