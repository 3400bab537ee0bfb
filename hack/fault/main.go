// Command fault has a kilnd build on a disk that fails, or is full; see package
// faulttest. It works under the directory for temporary files and leaves nothing
// behind.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/kilnbuild/kiln/hack/faultdisk"
	"github.com/kilnbuild/kiln/hack/faulttest"
)

func main() {
	faultdisk.Main()
	var cfg faulttest.Config
	var kinds string
	var verbose bool
	flag.StringVar(&cfg.Kilnd, "kilnd", "bin/kilnd", "the daemon")
	flag.StringVar(&kinds, "kinds", "", "kinds of work, with commas; all if it is empty")
	flag.BoolVar(&cfg.Every, "every", false, "have each request fail, not the first, second, fourth and so on")
	flag.BoolVar(&cfg.Quick, "quick", false, "two rounds for each kind of work")
	flag.BoolVar(&verbose, "v", false, "tell every round")
	flag.Parse()
	if kinds != "" {
		cfg.Kinds = strings.Split(kinds, ",")
	}
	if cfg.Log = io.Discard; verbose {
		cfg.Log = os.Stderr
	}
	if err := run(cfg); err != nil {
		fmt.Fprintln(os.Stderr, "fault:", err)
		os.Exit(1)
	}
}

func run(cfg faulttest.Config) (err error) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if cfg.Dir, err = os.MkdirTemp("", "kiln-fault-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(cfg.Dir)) }()
	res, err := faulttest.Run(ctx, cfg)
	fmt.Println(res)
	for _, f := range res.Failures {
		fmt.Println("FAILURE:", f)
	}
	if err == nil && len(res.Failures) > 0 {
		err = fmt.Errorf("%d failures", len(res.Failures))
	}
	return err
}
