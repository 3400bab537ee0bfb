//go:build linux && (amd64 || arm64)

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"

	"github.com/kilnbuild/kiln/executor/container"
	"github.com/kilnbuild/kiln/executor/seal"
	"github.com/kilnbuild/kiln/internal/cleanup"
	"github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"
)

func runCommand() *cli.Command {
	return &cli.Command{
		Name: "run", Usage: "create and start a container", ArgsUsage: "ID", StopOnNthArg: nth(1),
		Flags: append(createFlags(),
			&cli.BoolFlag{Name: "detach", Aliases: []string{"d"}, Usage: "don't wait for the container's end"},
			&cli.BoolFlag{Name: "keep", Usage: "don't delete the container when it has ended"},
			&cli.BoolFlag{Name: "no-subreaper", Usage: "accepted for compatibility: kilnrun is no subreaper"},
		),
		Action: run,
	}
}

func run(ctx context.Context, c *cli.Command) (err error) {
	if err := seal.Self(); err != nil {
		return err
	}
	bundle := c.String("bundle")
	if bundle == "" {
		bundle = "."
	}
	spec, err := container.LoadSpec(bundle)
	if err != nil {
		return err
	}
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	var term *terminal
	if spec.Process.Terminal && c.String("console-socket") == "" {
		if c.Bool("detach") {
			return errors.New("a container with a terminal that is detached needs --console-socket")
		}
		if term, err = newTerminal(); err != nil {
			return err
		}
		undo.Add(term.close)
	}
	signals := notify()
	defer signal.Stop(signals)
	io, err := ioFor(c, term.socket())
	if err != nil {
		return err
	}
	box, p, err := create(ctx, c, io)
	if err != nil {
		return err
	}
	if err := term.attach(); err != nil {
		return errors.Join(err, box.Delete(ctx, true))
	}
	if err := box.Start(ctx); err != nil {
		return errors.Join(err, box.Delete(ctx, true))
	}
	// Who reads the file may begin other processes in the container.
	if err := errors.Join(p.Failure(), writePid(c.String("pid-file"), p.Pid)); err != nil {
		return errors.Join(err, box.Delete(ctx, true))
	}
	if c.Bool("detach") {
		return p.Release()
	}
	code, err := wait(ctx, p, signals, term)
	if !c.Bool("keep") {
		err = errors.Join(err, box.Delete(ctx, true))
	}
	return finish(code, errors.Join(err, undo.Run()))
}

// finish makes this process end with code, unless something else is to be told.
func finish(code int, err error) error {
	if err != nil || code == 0 {
		return err
	}
	return exitCode(code)
}

// notify collects what is to be passed on.
func notify() chan os.Signal {
	signals := make(chan os.Signal, 64)
	signal.Notify(signals)
	signal.Reset(unix.SIGURG, unix.SIGCHLD) // of Go's runtime, and of children
	return signals
}

// wait waits for the end of p, passing signals on, and returns its exit code.
func wait(ctx context.Context, p *container.Process, signals <-chan os.Signal, term *terminal) (int, error) {
	type end struct {
		code int
		err  error
	}
	ended := make(chan end, 1)
	go func() {
		s, err := p.Wait(ctx, 0)
		ended <- end{s.Code(), err}
	}()
	for {
		select {
		case e := <-ended:
			return e.code, e.err
		case s := <-signals:
			switch s {
			case unix.SIGWINCH:
				term.resize()
			case unix.SIGURG, unix.SIGCHLD:
			default:
				if err := p.Signal(s.(unix.Signal)); err != nil {
					fmt.Fprintf(os.Stderr, "kilnrun: pass on %s: %v\n", s, err)
				}
			}
		}
	}
}
