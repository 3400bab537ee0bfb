package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// bench is what all runs share.
type bench struct {
	dir      string
	bin      string
	registry string // host:port
	base     string // reference of the base image
	daemons  int    // started so far
}

// sample is one run of one daemon.
type sample struct {
	wall   time.Duration
	cpu    time.Duration
	peakMB float64
	// switches are those of its threads.
	switches int64
}

// compare runs s in turns and prints its row.
func (b *bench) compare(s scenario, rounds int) error {
	input := filepath.Join(b.dir, s.name)
	if err := s.prepare(input, b.base); err != nil {
		return fmt.Errorf("prepare: %w", err)
	}
	var kiln, peer []sample
	var ratios []float64
	var cannot error
	if s.peerCan != nil {
		cannot = s.peerCan()
	}
	for i := range rounds {
		order := []bool{true, false}
		if cannot != nil {
			got, err := b.measure(s, input, true)
			if err != nil {
				return err
			}
			kiln = append(kiln, got)
			continue
		}
		if i%2 == 1 { // neither always goes first
			order = []bool{false, true}
		}
		pair := map[bool]sample{}
		for _, ours := range order {
			got, err := b.measure(s, input, ours)
			if err != nil {
				return err
			}
			pair[ours] = got
		}
		kiln, peer = append(kiln, pair[true]), append(peer, pair[false])
		ratios = append(ratios, pair[true].wall.Seconds()/pair[false].wall.Seconds())
	}
	wall := func(s sample) float64 { return s.wall.Seconds() }
	cpu := func(s sample) float64 { return s.cpu.Seconds() }
	mem := func(s sample) float64 { return s.peakMB }
	if cannot != nil {
		fmt.Printf("%-22s %9.3fs %10s %7s   %8.3fs %9s   %8.0f %8s   buildkitd can't: %v\n", s.name, median(kiln, wall), "-", "-", median(kiln, cpu), "-", median(kiln, mem), "-", cannot)
		return nil
	}
	fmt.Printf("%-22s %9.3fs %9.3fs %7.2f   %8.3fs %8.3fs   %8.0f %8.0f", s.name,
		median(kiln, wall), median(peer, wall), medianOf(ratios), median(kiln, cpu), median(peer, cpu), median(kiln, mem), median(peer, mem))
	if s.idle {
		switches := func(s sample) float64 { return float64(s.switches) }
		fmt.Printf("   context switches: %.0f, %.0f", median(kiln, switches), median(peer, switches))
	}
	fmt.Println()
	return nil
}

func median(s []sample, of func(sample) float64) float64 {
	v := make([]float64, len(s))
	for i := range s {
		v[i] = of(s[i])
	}
	return medianOf(v)
}

func medianOf(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	n := len(v)
	if n%2 == 1 {
		return v[n/2]
	}
	return (v[n/2-1] + v[n/2]) / 2
}

// measure runs s once on a daemon with a file system of its own.
func (b *bench) measure(s scenario, input string, ours bool) (out sample, err error) {
	disk, unmount, err := freshDisk(b.dir)
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, unmount()) }()
	d := b.daemon(disk, ours)
	d.args = append(d.args, s.args...)
	if !ours {
		d.args = append(d.args, s.peerArgs...)
	}
	if err := d.start(); err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	r := &runner{d: d, input: input, out: filepath.Join(disk, "out")}
	if err := s.warm(r); err != nil {
		return out, fmt.Errorf("warm up: %w", err)
	}
	process := d.cmd
	switched, err := d.switches()
	if err != nil {
		return out, err
	}
	before, err := d.cpu()
	if err != nil {
		return out, err
	}
	watch := d.watchMemory()
	start := time.Now()
	err = s.run(r)
	out.wall = time.Since(start)
	out.peakMB = watch.end()
	if err != nil {
		return out, err
	}
	after, err := d.cpu()
	if err != nil {
		return out, err
	}
	if out.switches, err = d.switches(); err != nil {
		return out, err
	}
	if out.cpu = after; d.cmd == process { // else it was started anew
		out.cpu -= before
		out.switches -= switched
	}
	return out, s.check(r)
}

// freshDisk mounts a new ext4 file system: making files near many just deleted
// ones is slow, and no run should pay for another's.
func freshDisk(dir string) (mountpoint string, unmount func() error, err error) {
	img := filepath.Join(dir, "disk.img")
	f, err := os.Create(img)
	if err != nil {
		return "", nil, err
	}
	if err := errors.Join(f.Truncate(8<<30), f.Close()); err != nil {
		return "", nil, err
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1", img).CombinedOutput(); err != nil {
		return "", nil, fmt.Errorf("mkfs.ext4: %w: %s", err, out)
	}
	mountpoint = filepath.Join(dir, "disk")
	if err := os.MkdirAll(mountpoint, 0o755); err != nil {
		return "", nil, err
	}
	if out, err := exec.Command("mount", "-o", "loop", img, mountpoint).CombinedOutput(); err != nil {
		return "", nil, fmt.Errorf("mount: %w: %s", err, out)
	}
	return mountpoint, func() error {
		out, err := exec.Command("umount", "-l", mountpoint).CombinedOutput()
		if err != nil {
			return fmt.Errorf("umount: %w: %s", err, out)
		}
		return os.Remove(img)
	}, nil
}

// daemon is kilnd or buildkitd.
type daemon struct {
	bench   *bench
	number  int // of the daemons so far
	addr    string
	program string
	args    []string
	cmd     *exec.Cmd // while it runs
	pid     atomic.Int64
}

func (b *bench) daemon(disk string, ours bool) *daemon {
	b.daemons++
	d := &daemon{bench: b, number: b.daemons, addr: "unix://" + filepath.Join(b.dir, "s"), program: filepath.Join(b.bin, "kilnd")}
	d.args = []string{"--root", filepath.Join(disk, "state"), "--addr", d.addr, "--config", "/dev/null"}
	if !ours {
		d.program = filepath.Join(b.bin, "peer", "buildkitd")
		d.args = append(d.args, "--oci-worker-net", "host", "--containerd-worker=false")
	}
	return d
}

// start runs the daemon and waits until it answers.
func (d *daemon) start() error {
	var log bytes.Buffer
	d.cmd = exec.Command(d.program, d.args...)
	d.cmd.Stdout, d.cmd.Stderr = &log, &log
	if err := d.cmd.Start(); err != nil {
		return err
	}
	d.pid.Store(int64(d.cmd.Process.Pid))
	err := d.dial()
	if err == nil {
		err = (&runner{d: d}).buildctl("--wait", "debug", "workers")
	}
	if err != nil {
		return errors.Join(fmt.Errorf("start %s: %w", d.program, err), d.stop(), errors.New(log.String()))
	}
	return nil
}

// dialInterval is short beside the few milliseconds after which a daemon listens.
const dialInterval = 250 * time.Microsecond

// dial waits until the daemon listens. buildctl would look ten times a second.
func (d *daemon) dial() error {
	deadline := time.Now().Add(20 * time.Second)
	tick := time.NewTicker(dialInterval)
	defer tick.Stop()
	for {
		c, err := net.Dial("unix", strings.TrimPrefix(d.addr, "unix://"))
		if err == nil {
			return c.Close()
		}
		if time.Now().After(deadline) {
			return err
		}
		<-tick.C
	}
}

func (d *daemon) stop() error {
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	d.cmd.Wait() // how it ends is no business of a benchmark
	return nil
}

// runner is a client of one run's daemon.
type runner struct {
	d     *daemon
	input string // the scenario's prepared files
	out   string // for results
}

// buildctl runs upstream's client.
func (r *runner) buildctl(args ...string) error {
	_, err := r.output(nil, args...)
	return err
}

// output runs upstream's client with stdin and returns what it prints.
func (r *runner) output(stdin io.Reader, args ...string) (string, error) {
	cmd := exec.Command(filepath.Join(r.d.bench.bin, "peer", "buildctl"), append([]string{"--addr", r.d.addr}, args...)...)
	cmd.Env = append(os.Environ(), "BUILDKIT_PROGRESS=plain")
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("buildctl %s: %w\n%s%s", strings.Join(args, " "), err, stdout.String(), stderr.String())
	}
	return stdout.String(), nil
}

// build builds the Dockerfile in the input's directory name.
func (r *runner) build(name string, args ...string) error {
	dir := filepath.Join(r.input, name)
	return r.buildctl(append([]string{"build", "--frontend", "dockerfile.v0",
		"--local", "context=" + dir, "--local", "dockerfile=" + dir}, args...)...)
}
