//go:build linux && (amd64 || arm64)

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/kilnbuild/kiln/executor/container"
	"github.com/moby/sys/signal"
	"github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"
)

// simple is a command that does one thing with a container.
func simple(name, usage string, do func(context.Context, *container.Container) error) *cli.Command {
	return &cli.Command{Name: name, Usage: usage, ArgsUsage: "ID", Action: func(ctx context.Context, c *cli.Command) error {
		box, err := load(c, 1)
		if err != nil {
			return err
		}
		return do(ctx, box)
	}}
}

func pauseCommand() *cli.Command {
	return simple("pause", "hold all processes of a container", func(ctx context.Context, box *container.Container) error { return box.Pause(ctx) })
}

func resumeCommand() *cli.Command {
	return simple("resume", "let a paused container go on", func(ctx context.Context, box *container.Container) error { return box.Resume(ctx) })
}

func killCommand() *cli.Command {
	return &cli.Command{
		Name: "kill", Usage: "send a signal to a container's first process", ArgsUsage: "ID [SIGNAL]",
		Flags: []cli.Flag{&cli.BoolFlag{Name: "all", Aliases: []string{"a"}, Usage: "to all processes of the container"}},
		Action: func(ctx context.Context, c *cli.Command) error {
			box, err := load(c, 2)
			if err != nil {
				return err
			}
			sig, err := parseSignal(c.Args().Get(1))
			if err != nil {
				return err
			}
			return box.Signal(ctx, sig, c.Bool("all"))
		},
	}
}

// parseSignal takes a number or a name, with SIG or without.
func parseSignal(text string) (unix.Signal, error) {
	if text == "" {
		return unix.SIGTERM, nil
	}
	if n, err := strconv.Atoi(text); err == nil {
		if n < 0 || n > 64 {
			return 0, fmt.Errorf("unknown signal %q", text)
		}
		return unix.Signal(n), nil
	}
	sig, ok := signal.SignalMap[strings.TrimPrefix(strings.ToUpper(text), "SIG")]
	if !ok {
		return 0, fmt.Errorf("unknown signal %q", text)
	}
	return sig, nil
}

func deleteCommand() *cli.Command {
	return &cli.Command{
		Name: "delete", Usage: "remove what a container holds", ArgsUsage: "ID",
		Flags: []cli.Flag{&cli.BoolFlag{Name: "force", Aliases: []string{"f"}, Usage: "kill it first if it runs; nothing to delete is fine"}},
		Action: func(ctx context.Context, c *cli.Command) error {
			force := c.Bool("force")
			box, err := load(c, 1)
			if force && errors.Is(err, container.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			return box.Delete(ctx, force)
		},
	}
}

func updateCommand() *cli.Command {
	flags := []cli.Flag{&cli.StringFlag{Name: "resources", Aliases: []string{"r"}, Usage: "file with resources as in a spec, - for standard input; other flags are ignored"}}
	for _, l := range limits {
		flags = append(flags, &cli.StringFlag{Name: l.name, Usage: l.usage})
	}
	for _, name := range []string{"l3-cache-schema", "mem-bw-schema"} {
		flags = append(flags, refused(name, "this runtime doesn't control caches and the bandwidth of memory; leave it out"))
	}
	return &cli.Command{
		Name: "update", Usage: "change the limits of a container", ArgsUsage: "ID", Flags: flags,
		Action: func(ctx context.Context, c *cli.Command) error {
			box, err := load(c, 1)
			if err != nil {
				return err
			}
			r, err := resourcesOf(c, os.Stdin)
			if err != nil {
				return err
			}
			return box.Update(ctx, r)
		},
	}
}
