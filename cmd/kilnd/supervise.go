package main

import (
	"context"

	"github.com/kilnbuild/kiln/executor/supervisor"
	"github.com/kilnbuild/kiln/internal/rootless"
	"github.com/urfave/cli/v3"
)

// superviseName is the command by which the daemon starts the supervisor of its
// steps.
const superviseName = "supervise"

func superviseCommand() *cli.Command {
	return &cli.Command{
		Name: superviseName, Hidden: true, Usage: "run steps that outlive the daemon; only the daemon calls this", SkipFlagParsing: true,
		Action: func(_ context.Context, c *cli.Command) error { return supervisor.Main(c.Args().Slice()) },
	}
}

// holdCommand is how an ordinary user's daemon calls itself in the namespaces
// that it makes.
func holdCommand() *cli.Command {
	return &cli.Command{
		Name: rootless.HoldCommand, Hidden: true, Usage: "keep namespaces while the daemon enters them; only the daemon calls this", SkipFlagParsing: true,
		Action: func(context.Context, *cli.Command) error { rootless.Hold(); return nil },
	}
}
