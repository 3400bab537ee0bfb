package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"sync"

	"github.com/containerd/console"
	"github.com/kilnbuild/kiln/client"
	"github.com/kilnbuild/kiln/client/progress"
	control "github.com/moby/buildkit/api/services/control"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/urfave/cli/v3"
)

// failedContainer is what --on-error=shell calls the container of its shell.
const failedContainer = "failed-step"

// onError opens a shell in the step that fails a build. The state that the step
// left is kept for as long as the build waits.
type onError struct {
	opts  client.SolveOptions
	stdin *os.File
	quiet func() error // ends the display of the build's progress
}

// newOnError reads --on-error. It returns nil if there is nothing to do.
func newOnError(c *cli.Command, opts client.SolveOptions) (*onError, error) {
	switch how := c.String("on-error"); how {
	case "", "fail":
		return nil, nil
	case "shell":
	default:
		return nil, fmt.Errorf("--on-error %q: it is shell or fail", how)
	}
	o := &onError{opts: opts, stdin: os.Stdin}
	if opts.Frontend == "" { // the definition was read from stdin
		tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
		if err != nil {
			return nil, fmt.Errorf("--on-error=shell needs input, but the definition was read from stdin and there is no terminal: %w", err)
		}
		o.stdin = tty
	}
	return o, nil
}

// drive builds what the options say.
func (o *onError) drive(ctx context.Context, g *client.Gateway) (*gwpb.Result, error) {
	res, err := g.Solve(ctx, &gwpb.SolveRequest{
		Definition: o.opts.Definition, Frontend: o.opts.Frontend, FrontendOpt: o.opts.Attrs, FrontendInputs: o.opts.Inputs, Evaluate: true,
	})
	var failed *errdefs.SolveError
	if !errors.As(err, &failed) || ctx.Err() != nil {
		return res, err
	}
	if err := o.quiet(); err != nil {
		return nil, err
	}
	fmt.Fprintf(os.Stderr, "error: %v\n", err)
	if serr := o.shell(ctx, g, failed.Solve); serr != nil {
		fmt.Fprintf(os.Stderr, "no shell in the failed step: %v\n", serr)
	}
	return nil, err
}

// shell runs a shell in the failed step until its user leaves it.
func (o *onError) shell(ctx context.Context, g *client.Gateway, failed *errdefs.Solve) error {
	step, err := newFailedStep(failed)
	if err != nil {
		return err
	}
	c, err := g.NewContainer(ctx, step.container(failedContainer))
	if err != nil {
		return err
	}
	args, err := step.findShell(ctx, c)
	if err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "%s in the failed step, with its files as it left them; leave it to end the build\n"+
		"another command in it, from elsewhere: buildctl debug exec %s COMMAND\n", strings.Join(args, " "), o.opts.Ref)
	return unlessExit(runInteractive(ctx, c, step.process(args), o.stdin))
}

// failedStep is an exec op that failed, and what it left.
type failedStep struct {
	op     *pb.Op
	exec   *pb.ExecOp
	mounts []string // ids of what each mount holds
	root   int      // index of the root's mount
}

func newFailedStep(failed *errdefs.Solve) (*failedStep, error) {
	s := &failedStep{op: failed.GetOp(), exec: failed.GetOp().GetExec(), mounts: failed.GetMountIDs(), root: -1}
	switch {
	case s.op == nil:
		return nil, errors.New("the daemon doesn't say which op it is")
	case s.exec == nil:
		return nil, errors.New("what failed doesn't run a command")
	case len(s.mounts) != len(s.exec.Mounts):
		return nil, errors.New("the daemon has nothing kept of it: it failed before its command could run")
	}
	for i, m := range s.exec.Mounts {
		if m.Dest == pb.RootMount {
			s.root = i
		}
	}
	return s, nil
}

// container is the step's, made from what it left.
func (s *failedStep) container(id string) *gwpb.NewContainerRequest {
	meta := s.exec.GetMeta()
	req := &gwpb.NewContainerRequest{
		ContainerID: id, Network: s.exec.Network, Platform: s.op.Platform, Constraints: s.op.Constraints,
		Hostname: meta.GetHostname(), ExtraHosts: meta.GetExtraHosts(),
	}
	for i, m := range s.exec.Mounts {
		m = m.CloneVT()
		m.ResultID, m.Input, m.Output = s.mounts[i], int64(pb.Empty), int64(pb.SkipOutput)
		if !path.IsAbs(m.Dest) {
			m.Dest = path.Join("/", meta.GetCwd(), m.Dest)
		}
		req.Mounts = append(req.Mounts, m)
	}
	return req
}

// process is a process as the step's was, with another command.
func (s *failedStep) process(args []string) *gwpb.InitMessage {
	meta := s.exec.GetMeta().CloneVT()
	meta.Args, meta.ValidExitCodes = args, nil
	return &gwpb.InitMessage{Meta: meta, Security: s.exec.Security, Secretenv: s.exec.Secretenv}
}

// findShell returns the shell that the step itself was run by, or another one
// that is there.
func (s *failedStep) findShell(ctx context.Context, c *client.Container) ([]string, error) {
	shells := [][]string{{"/bin/sh"}, {"/bin/bash"}, {"/bin/ash"}, {"/usr/bin/sh"}, {"/busybox/sh"}, {"/bin/busybox", "sh"}}
	args := s.exec.GetMeta().GetArgs()
	if len(args) > 2 && path.IsAbs(args[0]) && strings.HasPrefix(args[1], "-") && strings.Contains(args[1], "c") {
		shells = append([][]string{{args[0]}}, shells...)
	}
	var names []string
	for _, shell := range shells {
		if _, err := c.StatFile(ctx, s.root, shell[0]); err == nil {
			return shell, nil
		}
		names = append(names, shell[0])
	}
	return nil, fmt.Errorf("its root filesystem has none of %s", strings.Join(names, ", "))
}

// runInteractive runs a process on this program's streams, or on its terminal if
// stdin is one.
func runInteractive(ctx context.Context, c *client.Container, init *gwpb.InitMessage, stdin *os.File) error {
	p := client.Process{Init: init, Stdin: stdin, Stdout: os.Stdout, Stderr: os.Stderr}
	if term, err := console.ConsoleFromFile(stdin); err == nil {
		init.Tty, p.Stderr = true, nil
		if err := term.SetRaw(); err != nil {
			return fmt.Errorf("prepare terminal: %w", err)
		}
		defer term.Reset() //nolint:errcheck // what else could be done for it
		sizes, stop := terminalSizes(term)
		defer stop()
		p.Control = sizes
	}
	return c.Run(ctx, p)
}

// unlessExit is err unless that is how a shell ended: its code is that of the
// last command, and of no interest.
func unlessExit(err error) error {
	var exit *gwpb.ExitError
	if errors.As(err, &exit) && exit.ExitCode != notFoundCode && exit.ExitCode != notExecutableCode {
		return nil
	}
	return err
}

// Exit codes of programs that can't be executed.
const (
	notExecutableCode = 126
	notFoundCode      = 127
)

// display draws the progress of a build until it is ended; what comes later is
// dropped.
type display struct {
	mu    sync.Mutex // guards ended, and that nothing is shown once it is set
	ended bool
	*progress.Display
}

func startDisplay(ctx context.Context, w io.Writer, mode string) (*display, error) {
	d, err := progress.Start(ctx, w, mode)
	return &display{Display: d}, err
}

func (d *display) show(msg *control.StatusResponse) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.ended {
		d.Show(msg)
	}
}

// end may be called again.
func (d *display) end() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ended {
		return nil
	}
	d.ended = true
	return d.Wait()
}
