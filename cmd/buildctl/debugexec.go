package main

import (
	"context"
	"crypto/rand"
	"errors"
	"os"
	"time"

	"github.com/kilnbuild/kiln/client"
	"github.com/moby/buildkit/util/grpcerrors"
	"github.com/urfave/cli/v3"
	"google.golang.org/grpc/codes"
)

func debugExecCommand() *cli.Command {
	return &cli.Command{
		Name:      "exec",
		Usage:     "run a command in the failed step of a build that waits",
		ArgsUsage: "BUILD [COMMAND [ARG...]]",
		Description: "buildctl debug exec BUILD runs a shell, or COMMAND, in the step that failed in a build which waits with --on-error=shell:\n" +
			"beside that shell, in the same container. If another client drives the build, in a container of its own, made from what the step left.\n" +
			"BUILD is the id that --on-error=shell shows, or that --ref-file has.",
		SkipFlagParsing: true, // they are the command's
		Action:          runDebugExec,
	}
}

// releaseTimeout bounds how long a container may take to be gone.
const releaseTimeout = 10 * time.Second

func runDebugExec(ctx context.Context, c *cli.Command) (err error) {
	args := c.Args().Slice()
	if len(args) > 1 && args[1] == "--" {
		args = append(args[:1:1], args[2:]...)
	}
	if len(args) == 0 || args[0] == "" {
		return errors.New("which build? buildctl debug exec BUILD [COMMAND]: --on-error=shell shows the build's id when a step has failed")
	}
	cl, err := connect(ctx, c)
	if err != nil {
		return err
	}
	defer cl.Close()
	failed, err := cl.Failed(ctx, args[0])
	if err != nil {
		return err
	}
	step, err := newFailedStep(failed)
	if err != nil {
		return err
	}
	g := cl.Gateway(args[0])
	ctr := g.Container(failedContainer)
	_, err = ctr.StatFile(ctx, step.root, "/")
	if grpcerrors.Code(err) == codes.NotFound {
		if ctr, err = g.NewContainer(ctx, step.container("debug-exec-"+rand.Text())); err == nil {
			defer func() {
				ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
				defer cancel()
				err = errors.Join(err, ctr.Release(ctx))
			}()
		}
	}
	if err != nil {
		return err
	}
	return execIn(ctx, ctr, step, args[1:])
}

// execIn runs a command, or a shell if there is none.
func execIn(ctx context.Context, ctr *client.Container, step *failedStep, command []string) error {
	shell := len(command) == 0
	if shell {
		var err error
		if command, err = step.findShell(ctx, ctr); err != nil {
			return err
		}
	}
	err := runInteractive(ctx, ctr, step.process(command), os.Stdin)
	if shell || err == nil {
		return unlessExit(err)
	}
	return commandExit{err}
}
