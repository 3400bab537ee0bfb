// Command bench compares kiln with upstream's buildkitd: the same client, the
// same work, one after the other in turns (A B A B), each run on a file system
// of its own. It prints medians and the median of the pairs' ratios.
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"github.com/kilnbuild/kiln/hack/harness"
)

func main() {
	rounds := flag.Int("n", 5, "pairs of runs of each scenario")
	only := flag.String("run", "", "scenarios to run, a regular expression")
	bin := flag.String("bin", "bin", "directory of kilnd, with upstream's buildctl and buildkitd in peer/")
	flag.Parse()
	if err := run(*bin, *rounds, *only); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(bin string, rounds int, only string) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("root is needed: run sudo make bench")
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
	b := &bench{dir: dir, bin: bin, base: base}
	fmt.Printf("%d pairs each; wall clock of the client, cpu and peak memory of the daemon and what it runs; medians\n\n", rounds)
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
