package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/hack/harness"
	"github.com/kilnbuild/kiln/internal/thread"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// figure is something that is compared, but not by what a client waits for.
type figure struct {
	name  string
	print func(b *bench, rounds int) error
}

// runningSteps is how many steps run at once when their memory is counted.
const runningSteps = 100

// runningStep is the memory that a running step costs the daemon, without that of
// the step's own program.
var runningStep = figure{"running-step", func(b *bench, rounds int) error {
	input := filepath.Join(b.dir, "running")
	if err := prepareRunning(input, b.base); err != nil {
		return err
	}
	var kiln, peer []float64
	for range rounds {
		for ours, list := range map[bool]*[]float64{true: &kiln, false: &peer} {
			kb, err := b.measureRunning(input, ours)
			if err != nil {
				return err
			}
			*list = append(*list, kb)
		}
	}
	fmt.Printf("%-22s %8.0fKB %8.0fKB   memory of the daemon for a running step, with supervisor or runc; kiln and buildkitd\n\n", "running-step", medianOf(kiln), medianOf(peer))
	return nil
}}

func prepareRunning(dir, base string) error {
	var stages, copies strings.Builder
	for i := range runningSteps {
		fmt.Fprintf(&stages, "FROM %s AS s%d\nRUN [\"sleep\", \"%d\"]\n", base, i, 100000+i)
		fmt.Fprintf(&copies, "COPY --from=s%d / /\n", i)
	}
	if err := writeFile(filepath.Join(dir, "base", "Dockerfile"), "FROM "+base+"\nRUN echo warm\n"); err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, "sleep", "Dockerfile"), stages.String()+"FROM scratch\n"+copies.String())
}

// sleeper is the program of the steps.
const sleeper = "sleep"

func (b *bench) measureRunning(input string, ours bool) (kb float64, err error) {
	disk, unmount, err := freshDisk(b.dir)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, unmount()) }()
	d := b.daemon(disk, ours)
	if err := d.start(); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	r := &runner{d: d, input: input}
	if err := r.build("base"); err != nil {
		return 0, err
	}
	before, err := d.memoryKB(sleeper)
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	dir := filepath.Join(input, "sleep")
	client := exec.CommandContext(ctx, filepath.Join(b.bin, "peer", "buildctl"), "--addr", d.addr, "build", "--frontend", "dockerfile.v0",
		"--local", "context="+dir, "--local", "dockerfile="+dir)
	var log bytes.Buffer
	client.Stdout, client.Stderr = &log, &log
	if err := client.Start(); err != nil {
		return 0, err
	}
	err = harness.WaitFor(time.Minute, func() error {
		if n, err := d.count(sleeper); n < runningSteps || err != nil {
			return fmt.Errorf("%d of %d steps run: %w", n, runningSteps, errors.Join(err, errors.New("not all")))
		}
		return nil
	})
	after, merr := d.memoryKB(sleeper)
	cancel()
	client.Wait() //nolint:errcheck // it was killed
	err = errors.Join(err, merr, harness.WaitFor(time.Minute, func() error {
		if n, err := d.count(sleeper); n > 0 || err != nil {
			return fmt.Errorf("%d steps are left: %w", n, errors.Join(err, errors.New("not none")))
		}
		return nil
	}))
	return float64(after-before) / runningSteps, err
}

// count returns how many processes of the daemon have a name.
func (d *daemon) count(name string) (n int, err error) {
	all, err := d.processes()
	for _, p := range all {
		if p.named(name) {
			n++
		}
	}
	return n, err
}

const (
	aloneRuns     = 30 // one after the other
	aloneParallel = 50 // at once
)

// alone is a container from its creation to its exit, without a daemon: of the
// library that kilnd runs steps with, and of runtimes by their command lines.
func alone(name string, ownNetwork bool) figure {
	return figure{name, func(b *bench, rounds int) error {
		ways, end, err := b.ways(ownNetwork)
		if err != nil {
			return err
		}
		one, parallel, cpu := map[string][]float64{}, map[string][]float64{}, map[string][]float64{}
		id := 0
		for range rounds {
			for _, w := range ways {
				before := childrenCPU()
				start := time.Now()
				for range aloneRuns {
					id++
					if err := w.run(fmt.Sprint("b", id)); err != nil {
						return errors.Join(fmt.Errorf("%s: %w", w.name, err), end())
					}
				}
				one[w.name] = append(one[w.name], milliseconds(time.Since(start))/aloneRuns)
				cpu[w.name] = append(cpu[w.name], milliseconds(childrenCPU()-before)/aloneRuns)
				start = time.Now()
				var all errgroup.Group
				for range aloneParallel {
					id++
					name := fmt.Sprint("b", id)
					all.Go(func() error { return w.run(name) })
				}
				if err := all.Wait(); err != nil {
					return errors.Join(fmt.Errorf("%s: %w", w.name, err), end())
				}
				parallel[w.name] = append(parallel[w.name], milliseconds(time.Since(start)))
			}
		}
		for _, w := range ways {
			fmt.Printf("%-22s %-10s %8.2fms   cpu %6.2fms   %d at once %8.1fms\n", name, w.name, medianOf(one[w.name]), medianOf(cpu[w.name]), aloneParallel, medianOf(parallel[w.name]))
		}
		fmt.Println()
		return end()
	}}
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// childrenCPU is what this process and those it waited for have used.
func childrenCPU() (sum time.Duration) {
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		if unix.Getrusage(who, &u) == nil {
			sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
		}
	}
	return sum
}

// way is one way to run true in a container.
type way struct {
	name string
	run  func(id string) error
}

func (b *bench) ways(ownNetwork bool) (ways []way, end func() error, err error) {
	dir, err := os.MkdirTemp(b.dir, "alone")
	if err != nil {
		return nil, nil, err
	}
	root := filepath.Join(dir, "rootfs")
	if err := busyboxRoot(root); err != nil {
		return nil, nil, err
	}
	lib, err := executor.New(executor.Config{Root: filepath.Join(dir, "library"), CgroupParent: "/kiln-bench"})
	if err != nil {
		return nil, nil, err
	}
	p := executor.Process{
		Root: []mount.Mount{{Type: "bind", Source: root, Options: []string{"rbind"}}}, Args: []string{"true"}, Env: []string{"PATH=/bin"}, Cwd: "/", Network: executor.NetHost,
	}
	if ownNetwork {
		p.Network = executor.NetNone
	}
	ways = append(ways, way{"library", func(id string) error {
		p := p
		p.ID = id
		_, err := lib.Run(context.Background(), p)
		return err
	}})
	if err := b.writeBundle(dir, ownNetwork); err != nil {
		return nil, nil, errors.Join(err, lib.Close())
	}
	for name, program := range map[string]string{"kilnrun": filepath.Join(b.bin, "kilnrun"), "runc": "runc", "crun": "crun"} {
		path, err := exec.LookPath(program)
		if err != nil {
			fmt.Printf("%-22s %-10s can't be compared: %v\n", "alone", name, err)
			continue
		}
		state := filepath.Join(dir, name)
		run := func(id string) (err error) {
			if name == "crun" {
				thread.Run(func() {
					if err = hideVersion2(); err == nil {
						err = runBundle(path, state, dir, id)
					}
				})
				return err
			}
			return runBundle(path, state, dir, id)
		}
		if err := run("can"); err != nil {
			fmt.Printf("%-22s %-10s can't be compared: %v\n", "alone", name, err)
			continue
		}
		ways = append(ways, way{name, run})
	}
	slices.SortFunc(ways[1:], func(a, b way) int { return strings.Compare(a.name, b.name) })
	return ways, lib.Close, nil
}

func runBundle(program, state, bundle, id string) error {
	if out, err := exec.Command(program, "--root", state, "run", "--bundle", bundle, id).CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// hideVersion2 hides, from the calling thread and what it starts, version 2 of
// cgroups where version 1 is there too: crun refuses machines with both.
func hideVersion2() error {
	const second = "/sys/fs/cgroup/unified"
	if _, err := os.Stat(second); err != nil {
		return nil
	}
	return errors.Join(unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""), unix.Unmount(second, unix.MNT_DETACH))
}

// busyboxRoot makes a root file system with true.
func busyboxRoot(root string) error {
	for _, dir := range []string{"bin", "etc", "proc", "sys", "dev"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			return err
		}
	}
	for _, f := range []string{"hosts", "resolv.conf"} { // or each run would make and remove mount points
		if err := os.WriteFile(filepath.Join(root, "etc", f), nil, 0o644); err != nil {
			return err
		}
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return fmt.Errorf("a static busybox is needed: %w", err)
	}
	return errors.Join(os.WriteFile(filepath.Join(root, "bin/busybox"), busybox, 0o755), os.Symlink("busybox", filepath.Join(root, "bin/true")))
}

// writeBundle writes what runc's own command for that makes, with true as program.
func (b *bench) writeBundle(dir string, ownNetwork bool) error {
	out, err := exec.Command(filepath.Join(b.bin, "kilnrun"), "spec", "--bundle", dir).CombinedOutput()
	if err != nil {
		return fmt.Errorf("write a bundle: %w: %s", err, out)
	}
	path := filepath.Join(dir, "config.json")
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var s specs.Spec
	if err := json.Unmarshal(data, &s); err != nil {
		return err
	}
	s.Version = "1.0.2" // crun before 1.9 refuses newer ones
	s.Process.Terminal, s.Process.Args = false, []string{"/bin/true"}
	if !ownNetwork {
		s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.NetworkNamespace })
	}
	if data, err = json.Marshal(s); err != nil {
		return err
	}
	return os.WriteFile(path, data, 0o644)
}
