//go:build linux && (amd64 || arm64)

package main

import (
	"context"
	"errors"
	"fmt"
	"os/signal"
	"path/filepath"
	"slices"

	"github.com/kilnbuild/kiln/executor/container"
	"github.com/urfave/cli/v3"
)

// criuFlags are those of checkpoint and restore.
func criuFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "image-path", Usage: "directory of the checkpoint", Value: "checkpoint"},
		&cli.StringFlag{Name: "work-path", Usage: "directory for criu's logs; that of the checkpoint by default"},
		&cli.BoolFlag{Name: "tcp-established", Usage: "also with open TCP connections"},
		&cli.BoolFlag{Name: "ext-unix-sk", Usage: "also with sockets to processes outside"},
		&cli.BoolFlag{Name: "shell-job", Usage: "also of a shell"},
		&cli.BoolFlag{Name: "file-locks", Usage: "also with file locks"},
		&cli.StringFlag{Name: "manage-cgroups-mode", Usage: "soft, full, strict or ignore", Value: "soft"},
	}
}

// refusedByCriu are runc's flags of checkpoint and restore for what isn't done.
func refusedByCriu() []cli.Flag {
	const once = "memory is written down once, with the rest, and read back before the container goes on; leave it out"
	return []cli.Flag{
		refusedSwitch("pre-dump", once), refused("parent-path", once), refusedSwitch("auto-dedup", once),
		refusedSwitch("lazy-pages", once), refused("page-server", once), refused("status-fd", once),
		refused("empty-ns", "namespaces are restored with what was in them; leave it out"),
		refused("lsm-profile", "processes are restored with the profile that they had; leave it out"),
		refused("lsm-mount-context", "mounts are restored with the labels that they had; leave it out"),
	}
}

// refused is a flag of runc's that takes a value, and can't be given here.
func refused(name, why string) cli.Flag {
	return &cli.StringFlag{Name: name, Hidden: true, Action: func(context.Context, *cli.Command, string) error {
		return fmt.Errorf("--%s is not supported: %s", name, why)
	}}
}

// refusedSwitch is refused for one without a value.
func refusedSwitch(name, why string) cli.Flag {
	return &cli.BoolFlag{Name: name, Hidden: true, Action: func(_ context.Context, _ *cli.Command, on bool) error {
		if !on {
			return nil
		}
		return fmt.Errorf("--%s is not supported: %s", name, why)
	}}
}

// criuOf is what c's flags say of a checkpoint.
func criuOf(c *cli.Command) (container.Checkpoint, error) {
	images, err := filepath.Abs(c.String("image-path"))
	if err != nil {
		return container.Checkpoint{}, fmt.Errorf("--image-path: %w", err)
	}
	work := c.String("work-path")
	if work != "" {
		if work, err = filepath.Abs(work); err != nil {
			return container.Checkpoint{}, fmt.Errorf("--work-path: %w", err)
		}
	}
	switch mode := c.String("manage-cgroups-mode"); mode {
	case "soft", "full", "strict", "ignore":
	default:
		return container.Checkpoint{}, fmt.Errorf("--manage-cgroups-mode %q: it is soft, full, strict or ignore", mode)
	}
	return container.Checkpoint{
		Criu: c.String("criu"), Images: images, Work: work, LeaveRunning: c.Bool("leave-running"), TCPEstablished: c.Bool("tcp-established"), ExternalUnix: c.Bool("ext-unix-sk"),
		ShellJob: c.Bool("shell-job"), FileLocks: c.Bool("file-locks"), ManageCgroups: c.String("manage-cgroups-mode"),
	}, nil
}

func checkpointCommand() *cli.Command {
	return &cli.Command{
		Name: "checkpoint", Usage: "write a container's processes down, by criu", ArgsUsage: "ID",
		Flags: slices.Concat(criuFlags(), refusedByCriu(), []cli.Flag{&cli.BoolFlag{Name: "leave-running", Usage: "let them go on"}}),
		Action: func(ctx context.Context, c *cli.Command) error {
			box, err := load(c, 1)
			if err != nil {
				return err
			}
			o, err := criuOf(c)
			if err != nil {
				return err
			}
			if err := box.Save(ctx, o); err != nil || o.LeaveRunning {
				return err
			}
			return box.Delete(ctx, true)
		},
	}
}

func restoreCommand() *cli.Command {
	return &cli.Command{
		Name: "restore", Usage: "make a container from a checkpoint, by criu", ArgsUsage: "ID",
		Flags: slices.Concat(criuFlags(), refusedByCriu(), []cli.Flag{
			&cli.StringFlag{Name: "bundle", Aliases: []string{"b"}, Usage: "directory with config.json and the root file system; the current one by default"},
			pidFileFlag(), &cli.BoolFlag{Name: "detach", Aliases: []string{"d"}, Usage: "don't wait for the container's end"},
			&cli.BoolFlag{Name: "no-subreaper", Usage: "accepted for compatibility: kilnrun is no subreaper"},
			&cli.BoolFlag{Name: "no-pivot", Usage: "accepted for compatibility"},
		}),
		Action: restore,
	}
}

func restore(ctx context.Context, c *cli.Command) error {
	if err := arguments(c, 1, 1); err != nil {
		return err
	}
	o, err := criuOf(c)
	if err != nil {
		return err
	}
	bundle, err := filepath.Abs(c.String("bundle"))
	if err != nil {
		return fmt.Errorf("bundle: %w", err)
	}
	spec, err := container.LoadSpec(bundle)
	if err != nil {
		return err
	}
	if spec.Process.Terminal {
		return errors.New("restore: a container with a terminal isn't restored")
	}
	signals := notify()
	defer signal.Stop(signals)
	io, err := ioFor(c, nil)
	if err != nil {
		return err
	}
	box, p, err := runtimeOf(c).Restore(ctx, c.Args().First(), spec, container.Options{IO: io, Bundle: bundle, Systemd: c.Bool("systemd-cgroup")}, o)
	if err != nil {
		return err
	}
	if err := writePid(c.String("pid-file"), p.Pid); err != nil {
		return errors.Join(err, box.Delete(ctx, true))
	}
	if c.Bool("detach") {
		return p.Release()
	}
	code, err := wait(ctx, p, signals, nil)
	return finish(code, errors.Join(err, box.Delete(ctx, true)))
}
