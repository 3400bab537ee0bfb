//go:build linux && (amd64 || arm64)

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"github.com/kilnbuild/kiln/executor/container"
	"github.com/kilnbuild/kiln/executor/seal"
	"github.com/kilnbuild/kiln/executor/systemd"
	"github.com/kilnbuild/kiln/internal/cleanup"
	"github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"
)

func createFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "bundle", Aliases: []string{"b"}, Usage: "directory with config.json and the root file system; the current one by default"},
		consoleSocketFlag(), pidFileFlag(), preserveFlag(),
		&cli.BoolFlag{Name: "no-pivot", Usage: "cover the machine's root instead of pivoting from it: for one that is a ramdisk"},
		&cli.BoolFlag{Name: "no-new-keyring", Usage: "stay in the caller's session keyring"},
	}
}

func consoleSocketFlag() cli.Flag {
	return &cli.StringFlag{Name: "console-socket", Usage: "AF_UNIX socket that the terminal's master is sent to"}
}

func pidFileFlag() cli.Flag {
	return &cli.StringFlag{Name: "pid-file", Usage: "file to write the process id to"}
}

func preserveFlag() cli.Flag {
	return &cli.IntFlag{Name: "preserve-fds", Usage: "how many file descriptors after stdio, and after those of $LISTEN_FDS, to pass on"}
}

func createCommand() *cli.Command {
	return &cli.Command{
		Name: "create", Usage: "create a container", ArgsUsage: "ID", Flags: createFlags(), StopOnNthArg: nth(1),
		Action: func(ctx context.Context, c *cli.Command) error {
			io, err := ioFor(c, nil)
			if err != nil {
				return err
			}
			box, p, err := create(ctx, c, io)
			if err != nil {
				return err
			}
			if err := writePid(c.String("pid-file"), p.Pid); err != nil {
				return errors.Join(err, box.Delete(ctx, true))
			}
			return p.Release()
		},
	}
}

func startCommand() *cli.Command {
	return &cli.Command{
		Name: "start", Usage: "execute the program of a created container", ArgsUsage: "ID", StopOnNthArg: nth(1),
		Action: func(ctx context.Context, c *cli.Command) error {
			if err := seal.Self(); err != nil { // hooks may have to enter the container
				return err
			}
			box, err := load(c, 1)
			if err != nil {
				return err
			}
			return box.Start(ctx)
		},
	}
}

// nth is for commands whose arguments may look like flags.
func nth(n int) *int { return &n }

// load returns the container that the first argument names.
func load(c *cli.Command, most int) (*container.Container, error) {
	if err := arguments(c, 1, most); err != nil {
		return nil, err
	}
	return runtimeOf(c).Load(c.Args().First())
}

func arguments(c *cli.Command, least, most int) error {
	if n := c.Args().Len(); n < least || most >= 0 && n > most {
		return fmt.Errorf("kilnrun %s: %d arguments given; usage: kilnrun %s [flags] %s", c.Name, n, c.Name, c.ArgsUsage)
	}
	return nil
}

func runtimeOf(c *cli.Command) *container.Runtime {
	r := container.New(c.String("root"))
	r.Systemd = systemd.Connect
	r.Warn = func(err error) { warn(c.String("log"), c.String("log-format"), err) }
	return r
}

// ioFor makes what a process gets for input and output of this one's.
func ioFor(c *cli.Command, console *os.File) (container.IO, error) {
	listen, _ := strconv.Atoi(os.Getenv("LISTEN_FDS")) //nolint:errcheck // anything else is none
	n := listen + int(c.Int("preserve-fds"))
	return container.IO{Stdio: [3]*os.File{os.Stdin, os.Stdout, os.Stderr}, Console: console, Preserve: n}, checkInherited(n)
}

// checkInherited fails unless the caller left n files open from 3 on: a container
// must not get those that are this process's own, which an execve would close.
func checkInherited(n int) error {
	for fd := 3; fd < 3+n; fd++ {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err == nil && flags&unix.FD_CLOEXEC != 0 {
			err = unix.EBADF
		}
		if err != nil {
			return fmt.Errorf("pass %d file descriptors on (--preserve-fds, $LISTEN_FDS): %d isn't open: %w", n, fd, err)
		}
	}
	return nil
}

// create makes the container that c's flags and argument tell of.
func create(ctx context.Context, c *cli.Command, io container.IO) (_ *container.Container, _ *container.Process, err error) {
	if err := arguments(c, 1, 1); err != nil {
		return nil, nil, err
	}
	if err := seal.Self(); err != nil {
		return nil, nil, err
	}
	bundle, err := filepath.Abs(c.String("bundle"))
	if err != nil {
		return nil, nil, fmt.Errorf("bundle: %w", err)
	}
	spec, err := container.LoadSpec(bundle)
	if err != nil {
		return nil, nil, err
	}
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	if path := c.String("console-socket"); path != "" {
		if io.Console, err = dialConsole(path); err != nil {
			return nil, nil, err
		}
		undo.Add(io.Console.Close)
	}
	if n := os.Getenv("LISTEN_FDS"); n != "" {
		spec.Process.Env = append(spec.Process.Env, "LISTEN_FDS="+n, "LISTEN_PID=1")
	}
	box, p, err := runtimeOf(c).Create(ctx, c.Args().First(), spec, container.Options{IO: io, Bundle: bundle, NoNewKeyring: c.Bool("no-new-keyring"), Systemd: c.Bool("systemd-cgroup"), NoPivot: c.Bool("no-pivot")})
	if err != nil {
		return nil, nil, err
	}
	return box, p, nil
}

// dialConsole connects to a console socket.
func dialConsole(path string) (*os.File, error) {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("console socket: %w", err)
	}
	f, err := conn.File()
	return f, errors.Join(err, conn.Close())
}

// writePid writes the file at once, so that nobody reads half of it.
func writePid(name string, pid int) error {
	if name == "" {
		return nil
	}
	f, err := os.CreateTemp(filepath.Dir(name), ".pid")
	if err != nil {
		return fmt.Errorf("write pid file: %w", err)
	}
	_, err = f.WriteString(strconv.Itoa(pid))
	if err = errors.Join(err, f.Chmod(0o666), f.Close()); err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write pid file: %w", err), os.Remove(f.Name()))
	}
	return nil
}
