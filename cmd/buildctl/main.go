// Command buildctl is kiln's command line: upstream's verbs and flags for what
// the daemon has, and a short form of build that needs no others.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/log"
	"github.com/kilnbuild/kiln/internal/suggest"
	"github.com/kilnbuild/kiln/internal/version"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/stack"
	"github.com/urfave/cli/v3"
)

func main() {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A second interrupt ends the program at once.
	context.AfterFunc(ctx, cancel)
	app := command()
	if err := app.Run(ctx, os.Args); err != nil {
		printError(os.Stderr, err, app.Bool("debug"))
		os.Exit(exitCode(err))
	}
}

// commandExit is the error of a command that was run for the user and failed.
type commandExit struct{ error }

func (e commandExit) Unwrap() error { return e.error }

// exitCode is that of a command that was run for the user, else 1.
func exitCode(err error) int {
	var of commandExit
	var exit *gwpb.ExitError
	if errors.As(err, &of) && errors.As(err, &exit) {
		return int(exit.ExitCode)
	}
	return 1
}

func command() *cli.Command {
	return &cli.Command{
		Name:    "buildctl",
		Usage:   "build utility",
		Version: strings.Join([]string{version.Package, version.Protocol(), version.Revision}, " "),
		Suggest: true,
		Flags: append([]cli.Flag{
			&cli.BoolFlag{Name: "debug", Usage: "say which daemon is used, and print stack traces of errors"},
			&cli.BoolFlag{Name: "no-autostart", Usage: "don't start a private daemon when none listens"},
		}, connectionFlags()...),
		Before: func(ctx context.Context, c *cli.Command) (context.Context, error) {
			// Libraries log what a user can do nothing about.
			if !c.Bool("debug") {
				return ctx, log.SetLevel("error")
			}
			return ctx, nil
		},
		Commands:     []*cli.Command{buildCommand(), explainCommand(), duCommand(), pruneCommand(), debugCommand(), dialStdioCommand()},
		OnUsageError: func(_ context.Context, c *cli.Command, err error, _ bool) error { return suggest.Flag(err, c) },
	}
}

// printError shows the lines of the source that an error points at, then the
// error.
func printError(w io.Writer, err error, debug bool) {
	for _, src := range errdefs.Sources(err) {
		if !printable(src) {
			continue
		}
		if perr := src.Print(w); perr != nil {
			fmt.Fprintf(w, "the source that the error points at can't be shown: %v\n", perr)
		}
	}
	fmt.Fprintf(w, "error: %v\n", err)
	if debug {
		fmt.Fprintf(w, "%+v", stack.Formatter(err))
	}
}

// printable reports whether every range of src has both ends, as printing it
// takes for granted.
func printable(src *errdefs.Source) bool {
	return !slices.ContainsFunc(src.Ranges, func(r *pb.Range) bool { return r.GetStart() == nil || r.GetEnd() == nil })
}
