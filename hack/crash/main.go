// Command crash takes a kilnd down in the middle of builds, again and again; see
// package crashtest. It works under the directory for temporary files and leaves
// nothing behind.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"github.com/kilnbuild/kiln/hack/crashtest"
)

func main() {
	var cfg crashtest.Config
	flag.StringVar(&cfg.Kilnd, "kilnd", "bin/kilnd", "the daemon")
	flag.IntVar(&cfg.Rounds, "n", 100, "how often it is taken down")
	flag.BoolVar(&cfg.Power, "power", false, "cut the power of its disk, rather than kill it")
	flag.BoolVar(&cfg.Damage, "damage", false, "now and then damage the database as well")
	flag.IntVar(&cfg.Clients, "clients", 4, "builds at the same time")
	flag.DurationVar(&cfg.MaxLoad, "load", 0, "longest time of building in a round; 0 is 700ms")
	flag.DurationVar(&cfg.MaxStart, "start", 0, "longest time of a start; 0 is 2s")
	flag.DurationVar(&cfg.Bound, "bound", 0, "how long after its end a step must not be lost any more; 0 is 1s")
	flag.Uint64Var(&cfg.Seed, "seed", 1, "of the random choices")
	flag.Parse()
	if err := inOwnMounts(cfg); err != nil {
		fmt.Fprintln(os.Stderr, "crash:", err)
		os.Exit(1)
	}
}

// insideName is set in the environment of the process that does the work.
const insideName = "KILN_CRASH_INSIDE"

// inOwnMounts runs in a mount namespace of its own: one that others copy
// meanwhile would keep the disk in use whose power is cut.
func inOwnMounts(cfg crashtest.Config) error {
	if os.Getenv(insideName) != "" {
		return run(cfg)
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), insideName+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	// A signal of the terminal reaches both; the one inside cleans up.
	signal.Ignore(syscall.SIGINT)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGTERM}
	return cmd.Run()
}

func run(cfg crashtest.Config) (err error) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if cfg.Dir, err = os.MkdirTemp("", "kiln-crash-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(cfg.Dir)) }()
	cfg.Log = os.Stderr
	res, err := crashtest.Run(ctx, cfg)
	fmt.Println(res)
	if err == nil && len(res.Failures) > 0 {
		err = fmt.Errorf("%d failures", len(res.Failures))
	}
	return err
}
