//go:build linux && (amd64 || arm64)

package container

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Checkpoint is how the processes of a container are written to files, or made
// from them again, by the program criu. The files are criu's; beside them is
// what standard input and output were.
type Checkpoint struct {
	Criu   string // the program; "" is criu in PATH
	Images string // directory, which is made when needed
	Work   string // directory for logs; "" is Images

	LeaveRunning   bool
	TCPEstablished bool
	ExternalUnix   bool
	ShellJob       bool
	FileLocks      bool
	ManageCgroups  string // criu's mode; "" is soft
}

// descriptorsFile has what was open as 0, 1 and 2, as runc's checkpoints do.
const descriptorsFile = "descriptors.json"

// Save writes the container's processes down. They end, unless they are left
// running.
func (c *Container) Save(ctx context.Context, o Checkpoint) error {
	if _, err := c.in("checkpoint", Running, Paused); err != nil {
		return err
	}
	if c.Spec.Process.Terminal {
		return fmt.Errorf("checkpoint: container %s has a terminal, and couldn't be restored", c.ID)
	}
	if err := o.makeDirs(); err != nil {
		return err
	}
	links, err := c.streams(o.ShellJob)
	if err != nil {
		return err
	}
	text, err := json.Marshal(links)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(o.Images, descriptorsFile), text, 0o600); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	args := []string{"--tree", fmt.Sprint(c.Pid), "--root", rootDir(c.Spec, c.Bundle)}
	if dir := c.Groups.dir("freezer"); dir != "" {
		args = append(args, "--freeze-cgroup", dir)
	}
	network, err := joinedNetwork(c.Spec)
	if err != nil {
		return err
	}
	if network != "" {
		var st unix.Stat_t
		if err := unix.Stat(network, &st); err != nil {
			return fmt.Errorf("checkpoint: network namespace %s: %w", network, err)
		}
		args = append(args, "--external", fmt.Sprintf("net[%d]:%s", st.Ino, networkKey))
	}
	if o.LeaveRunning {
		args = append(args, "--leave-running")
	}
	for _, m := range c.external() {
		args = append(args, "--external", fmt.Sprintf("mnt[%s]:%s", m.Destination, m.Destination))
	}
	return o.run(ctx, "dump", args, nil)
}

// streams says what the process has as 0, 1 and 2. A file of the machine can't
// be opened again; a terminal can, of a shell job.
func (c *Container) streams(shellJob bool) ([]string, error) {
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", c.Pid))
	if err != nil {
		return nil, fmt.Errorf("checkpoint: %w", err)
	}
	links := make([]string, 3)
	for i := range links {
		link, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", c.Pid, i))
		if errors.Is(err, fs.ErrNotExist) { // it was closed
			continue
		} else if err != nil {
			return nil, fmt.Errorf("checkpoint: %w", err)
		}
		links[i] = link
		if shellJob || !strings.HasPrefix(link, "/") {
			continue
		}
		info, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%d", c.Pid, i))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return nil, fmt.Errorf("checkpoint: %w", err)
		}
		if !strings.Contains("\n"+string(mounts), "\n"+mountID(string(info))+" ") {
			return nil, fmt.Errorf("checkpoint: file descriptor %d of the container is %s of the machine, which couldn't be restored; start it with a pipe there", i, link)
		}
	}
	return links, nil
}

// mountID is that of an open file, whose fdinfo is given.
func mountID(fdinfo string) string {
	_, after, _ := strings.Cut(fdinfo, "mnt_id:")
	line, _, _ := strings.Cut(after, "\n")
	return strings.TrimSpace(line)
}

// networkKey names a network namespace that isn't the container's own, in a
// checkpoint.
const networkKey = "extRootNetNS"

// joinedNetwork returns the path of the network namespace that the container
// joins, if it does. Others can't be joined again.
func joinedNetwork(s *specs.Spec) (path string, err error) {
	for _, ns := range s.Linux.Namespaces {
		switch {
		case ns.Path == "":
		case ns.Type == specs.NetworkNamespace:
			path = ns.Path
		default:
			return "", fmt.Errorf("checkpoint and restore: the container has the %s namespace %s of others; only a network can be shared", ns.Type, ns.Path)
		}
	}
	return path, nil
}

// external are mounts whose content isn't the container's own.
func (c *Container) external() (list []specs.Mount) {
	for _, m := range c.Spec.Mounts {
		switch {
		case m.Type == "cgroup" && c.Groups.V2 == "":
			for name, dir := range c.Groups.views() {
				list = append(list, specs.Mount{Destination: filepath.Join(m.Destination, name), Source: dir})
			}
		case m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind"):
			source := m.Source
			if !filepath.IsAbs(source) {
				source = filepath.Join(c.Bundle, source)
			}
			list = append(list, specs.Mount{Destination: m.Destination, Source: source})
		}
	}
	for _, p := range c.Spec.Linux.MaskedPaths {
		// Directories are covered by file systems of the container's own.
		if info, err := os.Lstat(filepath.Join("/proc", fmt.Sprint(c.Pid), "root", p)); c.Pid != 0 && (err != nil || info.IsDir()) {
			continue
		}
		list = append(list, specs.Mount{Destination: p, Source: "/dev/null"})
	}
	slices.SortFunc(list, func(a, b specs.Mount) int { return strings.Compare(a.Destination, b.Destination) })
	return list
}

func (o *Checkpoint) makeDirs() error {
	o.Work = cmp.Or(o.Work, o.Images)
	for _, dir := range []string{o.Images, o.Work} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make directory for a checkpoint: %w", err)
		}
	}
	return nil
}

// run runs criu. files are open in it from 3 on.
func (o *Checkpoint) run(ctx context.Context, action string, args []string, files []*os.File) error {
	program, err := exec.LookPath(cmp.Or(o.Criu, "criu"))
	if err != nil {
		return fmt.Errorf("the memory of containers is written and read by criu: %w; install the package criu, or say where it is with --criu", err)
	}
	log := action + ".log"
	all := []string{action, "--images-dir", o.Images, "--work-dir", o.Work, "--log-file", log, "-v4", "--manage-cgroups=" + cmp.Or(o.ManageCgroups, "soft")}
	for _, flag := range []struct {
		on   bool
		name string
	}{{o.TCPEstablished, "--tcp-established"}, {o.ExternalUnix, "--ext-unix-sk"}, {o.ShellJob, "--shell-job"}, {o.FileLocks, "--file-locks"}} {
		if flag.on {
			all = append(all, flag.name)
		}
	}
	cmd := exec.CommandContext(ctx, program, append(all, args...)...)
	cmd.ExtraFiles, cmd.WaitDelay = files, hookWaitDelay
	out, err := cmd.CombinedOutput()
	if err == nil || errors.Is(err, exec.ErrWaitDelay) { // what it restored has its output
		return nil
	}
	file := filepath.Join(o.Work, log)
	text := cmp.Or(lastErrors(file), strings.TrimSpace(string(out)))
	return fmt.Errorf("criu %s: %w: %s (its log is %s)", action, err, text, file)
}

// lastErrors returns the last three errors of criu's log: the very last one is
// often that it failed.
func lastErrors(file string) string {
	f, err := os.Open(file)
	if err != nil {
		return "" // it didn't get that far
	}
	defer f.Close()
	var all []string
	for scan := bufio.NewScanner(f); scan.Scan(); {
		if strings.Contains(scan.Text(), "Error (") {
			all = append(all, strings.TrimSpace(scan.Text()))
		}
	}
	return strings.Join(all[max(0, len(all)-3):], "; ")
}
