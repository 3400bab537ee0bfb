//go:build linux && (amd64 || arm64)

// Command kilnrun is kiln's container runtime with the command line of runc:
// what starts containers with runc, such as containerd, can use it instead.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/kilnbuild/kiln/internal/suggest"
	"github.com/kilnbuild/kiln/internal/version"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/urfave/cli/v3"
)

// exitCode is an error that is only an exit code: a process's own.
type exitCode int

func (e exitCode) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

func main() {
	app := command()
	err := app.Run(context.Background(), os.Args)
	var code exitCode
	switch {
	case errors.As(err, &code):
		os.Exit(int(code))
	case err != nil:
		if lerr := logError(app.String("log"), app.String("log-format"), err); lerr != nil {
			fmt.Fprintln(os.Stderr, "kilnrun:", lerr)
		}
		var f failure
		if errors.As(err, &f) {
			os.Exit(255)
		}
		os.Exit(1)
	}
}

func command() *cli.Command {
	cli.VersionPrinter = func(c *cli.Command) {
		fmt.Fprintf(c.Root().Writer, "kilnrun version %s\ncommit: %s\nspec: %s\n", version.Protocol(), c.Root().Version, specs.Version)
	}
	app := &cli.Command{
		Name:    "kilnrun",
		Usage:   "run containers that are OCI bundles",
		Version: cmp.Or(version.Revision, "unknown"),
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "debug", Usage: "accepted for compatibility: there is no debug log"},
			&cli.StringFlag{Name: "log", Usage: "file that errors are also written to"},
			&cli.StringFlag{Name: "log-format", Usage: "text or json", Value: "text"},
			&cli.StringFlag{Name: "root", Usage: "directory for the state of containers", Value: "/run/kilnrun"},
			&cli.StringFlag{Name: "criu", Usage: "program for checkpoint and restore; criu in PATH by default"},
			&cli.BoolFlag{Name: "systemd-cgroup", Usage: "have systemd make cgroups; cgroupsPath is slice:prefix:name then"},
			&cli.StringFlag{Name: "rootless", Usage: "auto or false", Value: "auto"},
		},
		HideHelpCommand: true,
		Before:          before,
		ExitErrHandler:  func(context.Context, *cli.Command, error) {}, // main prints
		OnUsageError:    usageError,
		Action:          unknownCommand,
		Commands: []*cli.Command{
			createCommand(), runCommand(), startCommand(), execCommand(), killCommand(), deleteCommand(), stateCommand(), listCommand(),
			psCommand(), eventsCommand(), pauseCommand(), resumeCommand(), updateCommand(), specCommand(), featuresCommand(),
			checkpointCommand(), restoreCommand(),
		},
	}
	for _, c := range app.Commands {
		c.OnUsageError = usageError
	}
	return app
}

func usageError(_ context.Context, c *cli.Command, err error, _ bool) error {
	return suggest.Flag(err, c)
}

// unknownCommand is what is done where no command is known by the first
// argument.
func unknownCommand(_ context.Context, c *cli.Command) error {
	if c.Args().Len() == 0 {
		return cli.ShowAppHelp(c)
	}
	var known []string
	for _, command := range c.Commands {
		known = append(known, command.Name)
	}
	given := c.Args().First()
	return fmt.Errorf("unknown command %q%s", given, suggest.Nearest(given, known))
}

func before(ctx context.Context, c *cli.Command) (context.Context, error) {
	switch format := c.String("log-format"); {
	case format != "text" && format != "json":
		return ctx, fmt.Errorf("--log-format %q: it is text or json", format)
	case c.String("rootless") == "true":
		return ctx, errors.New("--rootless=true: kilnrun needs root")
	}
	return ctx, nil
}
