// Command bench compares kiln with upstream's buildkitd: the same client, the
// same work, one after the other in turns (A B A B), each run on a file system
// of its own. It prints medians and the median of the pairs' ratios. Before, it
// compares what a running step costs a daemon, and containers alone.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"syscall"

	"github.com/kilnbuild/kiln/hack/harness"
	"github.com/vishvananda/netlink"
)

func main() {
	if os.Getenv(inside) == "" {
		os.Exit(runInside())
	}
	rounds := flag.Int("n", 5, "pairs of runs of each scenario")
	only := flag.String("run", "", "scenarios to run, a regular expression")
	bin := flag.String("bin", "bin", "directory of kilnd, with upstream's buildctl and buildkitd in peer/")
	flag.Parse()
	if err := run(*bin, *rounds, *only); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// inside says that this process is in a network of its own.
const inside = "KILN_BENCH_OWN_NETWORK"

// runInside runs this program again in a network of its own, where daemons may
// make bridges without touching the machine's, and with mounts of its own, so that
// none stays if it is killed.
func runInside() int {
	runtime.LockOSThread() // the child ends with this thread
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench: root is needed, to run in a network of its own (sudo make bench):", err)
		return 1
	}
	return 0
}

func run(bin string, rounds int, only string) error {
	if err := loopbackUp(); err != nil {
		return err
	}
	pattern, err := regexp.Compile(only)
	if err != nil {
		return fmt.Errorf("-run: %w", err)
	}
	bin, err = filepath.Abs(bin)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "kiln-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	reg, err := harness.StartRegistry(dir)
	if err != nil {
		return err
	}
	defer reg.Stop()
	_, base, err := reg.PushBusybox(dir)
	if err != nil {
		return err
	}
	b := &bench{dir: dir, bin: bin, registry: reg.Host, base: base}
	fmt.Printf("%d pairs each; wall clock of the client, cpu and peak memory of the daemon and all that it runs, supervisor, runc and steps; medians.\n", rounds)
	fmt.Printf("Memory is the sum of proportional shares (PSS), looked at every %s: what two processes share is counted once.\n\n", memoryInterval)
	for _, f := range []figure{runningStep, alone("alone-host", false), alone("alone-none", true)} {
		if !pattern.MatchString(f.name) {
			continue
		}
		if err := f.print(b, rounds); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
	}
	fmt.Printf("%-22s %10s %10s %7s   %9s %9s   %8s %8s\n", "scenario", "kiln", "buildkitd", "ratio", "cpu kiln", "cpu peer", "MB kiln", "MB peer")
	for _, s := range scenarios {
		if !pattern.MatchString(s.name) {
			continue
		}
		if err := b.compare(s, rounds); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("set loopback up: %w", err)
	}
	return nil
}
