//go:build linux && (amd64 || arm64)

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"

	"github.com/kilnbuild/kiln/executor/container"
	"github.com/kilnbuild/kiln/executor/seal"
	"github.com/kilnbuild/kiln/internal/cleanup"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"
)

func execCommand() *cli.Command {
	return &cli.Command{
		Name: "exec", Usage: "execute a further process in a container", ArgsUsage: "ID COMMAND [ARGUMENT...] or --process FILE ID", StopOnNthArg: nth(1),
		Flags: []cli.Flag{
			consoleSocketFlag(), pidFileFlag(), preserveFlag(),
			&cli.StringFlag{Name: "cwd", Usage: "working directory in the container"},
			&cli.StringSliceFlag{Name: "env", Aliases: []string{"e"}, Usage: "environment variable, NAME=VALUE"},
			&cli.BoolFlag{Name: "tty", Aliases: []string{"t"}, Usage: "with a terminal"},
			&cli.StringFlag{Name: "user", Aliases: []string{"u"}, Usage: "UID[:GID]"},
			&cli.IntSliceFlag{Name: "additional-gids", Aliases: []string{"g"}, Usage: "further groups"},
			&cli.StringFlag{Name: "process", Aliases: []string{"p"}, Usage: "file with the process as in a spec"},
			&cli.BoolFlag{Name: "detach", Aliases: []string{"d"}, Usage: "don't wait for its end"},
			&cli.StringFlag{Name: "process-label", Usage: "SELinux label"},
			&cli.StringFlag{Name: "apparmor", Usage: "AppArmor profile"},
			&cli.BoolFlag{Name: "no-new-privs", Usage: "no further privileges by executing programs"},
			&cli.StringSliceFlag{Name: "cap", Aliases: []string{"c"}, Usage: "further capability"},
			&cli.StringSliceFlag{Name: "cgroup", Usage: "existing group below the container's, [CONTROLLER[,CONTROLLER]:]PATH"},
			&cli.BoolFlag{Name: "ignore-paused", Usage: "also in a paused container, where it waits"},
		},
		DisableSliceFlagSeparator: true,
		Action: func(ctx context.Context, c *cli.Command) error {
			if err := arguments(c, 1, -1); err != nil {
				return err
			}
			err := execute(ctx, c)
			var code exitCode
			if err == nil || errors.As(err, &code) {
				return err
			}
			return failure{fmt.Errorf("exec failed: %w", err)}
		},
	}
}

func execute(ctx context.Context, c *cli.Command) (err error) {
	if err := seal.Self(); err != nil {
		return err
	}
	box, err := load(c, -1)
	if err != nil {
		return err
	}
	process, err := processOf(c, box)
	if err != nil {
		return err
	}
	cgroups, err := cgroupsOf(c.StringSlice("cgroup"))
	if err != nil {
		return err
	}
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	var console *os.File
	var term *terminal
	switch path := c.String("console-socket"); {
	case path != "":
		if console, err = dialConsole(path); err != nil {
			return err
		}
		undo.Add(console.Close)
	case process.Terminal && c.Bool("detach"):
		return errors.New("a process with a terminal that is detached needs --console-socket")
	case process.Terminal:
		if term, err = newTerminal(); err != nil {
			return err
		}
		undo.Add(term.close)
		console = term.socket()
	}
	signals := notify()
	defer signal.Stop(signals)
	io, err := ioFor(c, console)
	if err != nil {
		return err
	}
	p, err := box.Exec(ctx, process, container.ExecOptions{IO: io, Cgroups: cgroups, Paused: c.Bool("ignore-paused")})
	if err != nil {
		return err
	}
	err = errors.Join(writePid(c.String("pid-file"), p.Pid), term.attach())
	if err != nil {
		return errors.Join(err, p.Signal(unix.SIGKILL))
	}
	if c.Bool("detach") {
		return p.Release()
	}
	code, err := wait(ctx, p, signals, term)
	return finish(code, errors.Join(err, undo.Run()))
}

// processOf makes the process that flags, arguments or a file describe; what
// they don't mention is as the container's own process has it.
func processOf(c *cli.Command, box *container.Container) (*specs.Process, error) {
	if file := c.String("process"); file != "" {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("--process: %w", err)
		}
		p := &specs.Process{}
		if err := json.Unmarshal(b, p); err != nil {
			return nil, fmt.Errorf("--process %s: %w", file, err)
		}
		return p, nil
	}
	if c.Args().Len() < 2 {
		return nil, errors.New("no command given, and no --process")
	}
	if box.Spec == nil {
		return nil, fmt.Errorf("container %s isn't completely created", box.ID)
	}
	p := *box.Spec.Process
	p.Args = c.Args().Tail()
	p.Terminal = c.Bool("tty")
	p.ConsoleSize = nil
	p.Env = append(append([]string{}, p.Env...), c.StringSlice("env")...)
	if cwd := c.String("cwd"); cwd != "" {
		p.Cwd = cwd
	}
	if c.IsSet("no-new-privs") {
		p.NoNewPrivileges = c.Bool("no-new-privs")
	}
	if l := c.String("process-label"); l != "" {
		p.SelinuxLabel = l
	}
	if l := c.String("apparmor"); l != "" {
		p.ApparmorProfile = l
	}
	p.Capabilities = withCaps(p.Capabilities, c.StringSlice("cap"))
	for _, g := range c.IntSlice("additional-gids") {
		if g < 0 || g > 1<<32-2 {
			return nil, fmt.Errorf("--additional-gids %d: not a group id", g)
		}
		p.User.AdditionalGids = append(p.User.AdditionalGids, uint32(g))
	}
	return &p, setUser(&p, c.String("user"))
}

func withCaps(have *specs.LinuxCapabilities, more []string) *specs.LinuxCapabilities {
	if len(more) == 0 {
		return have
	}
	var caps specs.LinuxCapabilities
	if have != nil {
		caps = *have
	}
	for _, set := range []*[]string{&caps.Bounding, &caps.Effective, &caps.Permitted, &caps.Ambient} {
		*set = append(append([]string{}, *set...), more...)
	}
	return &caps
}

func setUser(p *specs.Process, user string) error {
	if user == "" {
		return nil
	}
	uid, gid, both := strings.Cut(user, ":")
	for _, part := range []struct {
		text string
		id   *uint32
		set  bool
	}{{uid, &p.User.UID, true}, {gid, &p.User.GID, both}} {
		if !part.set {
			continue
		}
		n, err := strconv.ParseUint(part.text, 10, 32)
		if err != nil {
			return fmt.Errorf("--user %q: it is UID[:GID], as numbers", user)
		}
		*part.id = uint32(n)
	}
	return nil
}

// cgroupsOf parses --cgroup.
func cgroupsOf(list []string) (map[string]string, error) {
	groups := map[string]string{}
	for _, text := range list {
		controllers, path, ok := strings.Cut(text, ":")
		if !ok {
			controllers, path = "", text
		}
		for name := range strings.SplitSeq(controllers, ",") {
			if _, twice := groups[name]; twice {
				return nil, fmt.Errorf("--cgroup %q: a group for %q was given before", text, name)
			}
			groups[name] = path
		}
	}
	return groups, nil
}

// failure is an error of a process that couldn't be executed, for which runc
// ends with 255.
type failure struct{ error }

func (f failure) Unwrap() error { return f.error }
