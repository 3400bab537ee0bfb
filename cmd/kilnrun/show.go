//go:build linux && (amd64 || arm64)

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/kilnbuild/kiln/executor/container"
	"github.com/urfave/cli/v3"
	"golang.org/x/sys/unix"
)

func stateCommand() *cli.Command {
	return &cli.Command{
		Name: "state", Usage: "print a container's state", ArgsUsage: "ID",
		Action: func(_ context.Context, c *cli.Command) error {
			box, err := load(c, 1)
			if err != nil {
				return err
			}
			s, err := box.State()
			if err != nil {
				return err
			}
			return printJSON(c.Root().Writer, s)
		},
	}
}

func printJSON(w io.Writer, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(w, string(b))
	return err
}

func formatFlag() cli.Flag {
	return &cli.StringFlag{Name: "format", Aliases: []string{"f"}, Usage: "table or json", Value: "table"}
}

// format returns --format, which must be one of the two.
func format(c *cli.Command) (string, error) {
	f := c.String("format")
	if f != "table" && f != "json" {
		return "", fmt.Errorf("--format %q: it is table or json", f)
	}
	return f, nil
}

func listCommand() *cli.Command {
	return &cli.Command{
		Name: "list", Usage: "list the containers below --root", Flags: []cli.Flag{
			formatFlag(), &cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "only their ids"},
		},
		Action: list,
	}
}

func list(_ context.Context, c *cli.Command) error {
	if err := arguments(c, 0, 0); err != nil {
		return err
	}
	format, err := format(c)
	if err != nil {
		return err
	}
	boxes, err := runtimeOf(c).List()
	if err != nil {
		return err
	}
	w := c.Root().Writer
	var states []container.State
	for _, box := range boxes {
		if c.Bool("quiet") {
			fmt.Fprintln(w, box.ID)
			continue
		}
		s, err := box.State()
		if err != nil {
			return err
		}
		if s.Owner, err = owner(box.Dir()); err != nil {
			return err
		}
		states = append(states, s)
	}
	switch {
	case c.Bool("quiet"):
		return nil
	case format == "json":
		return json.NewEncoder(w).Encode(states)
	}
	tw := tabwriter.NewWriter(w, 12, 1, 3, ' ', 0)
	fmt.Fprint(tw, "ID\tPID\tSTATUS\tBUNDLE\tCREATED\tOWNER\n")
	for _, s := range states {
		fmt.Fprintf(tw, "%s\t%d\t%s\t%s\t%s\t%s\n", s.ID, s.Pid, s.Status, s.Bundle, s.Created.Format(time.RFC3339Nano), s.Owner)
	}
	return tw.Flush()
}

// owner names whom a container's directory belongs to.
func owner(dir string) (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return "", fmt.Errorf("find owner of %s: %w", dir, err)
	}
	uid := strconv.Itoa(int(st.Uid))
	u, err := user.LookupId(uid)
	if err != nil {
		return "#" + uid, nil // one without a name
	}
	return u.Username, nil
}

func psCommand() *cli.Command {
	return &cli.Command{
		Name: "ps", Usage: "list the processes of a container", ArgsUsage: "ID [OPTION OF PS...]", Flags: []cli.Flag{formatFlag()}, StopOnNthArg: nth(1),
		Action: ps,
	}
}

func ps(ctx context.Context, c *cli.Command) error {
	box, err := load(c, -1)
	if err != nil {
		return err
	}
	format, err := format(c)
	if err != nil {
		return err
	}
	pids, err := box.Processes()
	if err != nil {
		return err
	}
	w := c.Root().Writer
	if format == "json" {
		return json.NewEncoder(w).Encode(pids)
	}
	args := c.Args().Tail()
	if len(args) == 0 {
		args = []string{"-ef"}
	}
	out, err := exec.CommandContext(ctx, "ps", args...).Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(exit.Stderr))
	}
	if err != nil {
		return fmt.Errorf("run ps %s: %w", strings.Join(args, " "), err)
	}
	return filterPs(w, out, pids)
}

// filterPs prints the heading and the lines of pids.
func filterPs(w io.Writer, out []byte, pids []int) error {
	lines := bytes.Split(bytes.TrimRight(out, "\n"), []byte("\n"))
	column := slices.Index(strings.Fields(string(lines[0])), "PID")
	if column < 0 {
		return errors.New("couldn't find PID field in ps output")
	}
	fmt.Fprintf(w, "%s\n", lines[0])
	for _, line := range lines[1:] {
		fields := bytes.Fields(line)
		if len(fields) <= column {
			continue
		}
		if pid, err := strconv.Atoi(string(fields[column])); err == nil && slices.Contains(pids, pid) {
			fmt.Fprintf(w, "%s\n", line)
		}
	}
	return nil
}

func eventsCommand() *cli.Command {
	return &cli.Command{
		Name: "events", Usage: "print what a container uses, and when it runs out of memory", ArgsUsage: "ID", Flags: []cli.Flag{
			&cli.DurationFlag{Name: "interval", Usage: "how often", Value: 5 * time.Second},
			&cli.BoolFlag{Name: "stats", Usage: "once"},
		},
		Action: events,
	}
}

// event is a line of events.
type event struct {
	Type string `json:"type"`
	ID   string `json:"id"`
	Data any    `json:"data,omitempty"`
}

// oomInterval is how often the kernel's count of its kills is looked at.
const oomInterval = 100 * time.Millisecond

func events(ctx context.Context, c *cli.Command) error {
	box, err := load(c, 1)
	if err != nil {
		return err
	}
	out := json.NewEncoder(c.Root().Writer)
	if c.Bool("stats") {
		s, err := box.Stats()
		if err != nil {
			return err
		}
		return out.Encode(event{"stats", box.ID, s})
	}
	interval := c.Duration("interval")
	if interval <= 0 {
		return fmt.Errorf("--interval %s: it must be more than nothing", interval)
	}
	return watch(ctx, box, interval, out)
}

// watch prints events until the container ends.
func watch(ctx context.Context, box *container.Container, interval time.Duration, out *json.Encoder) error {
	kills, err := box.OOMKills()
	if err != nil {
		return err
	}
	stats, looks := time.NewTicker(interval), time.NewTicker(oomInterval)
	defer stats.Stop()
	defer looks.Stop()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- box.Ended(ctx) }()
	for {
		select {
		case err := <-ended:
			return err
		case <-looks.C:
			now, err := box.OOMKills()
			if err == nil && now > kills {
				kills, err = now, out.Encode(event{"oom", box.ID, nil})
			}
			if err != nil {
				return errors.Join(err, ctx.Err())
			}
		case <-stats.C:
			s, err := box.Stats()
			if errors.Is(err, container.ErrNotRunning) {
				continue // told by ended
			}
			if err == nil {
				err = out.Encode(event{"stats", box.ID, s})
			}
			if err != nil {
				return err
			}
		}
	}
}

func featuresCommand() *cli.Command {
	return &cli.Command{
		Name: "features", Usage: "print what this runtime can do", Action: func(_ context.Context, c *cli.Command) error {
			return printJSON(c.Root().Writer, container.Features())
		},
	}
}

func specCommand() *cli.Command {
	return &cli.Command{
		Name: "spec", Usage: "write a config.json to start from", Flags: []cli.Flag{
			&cli.StringFlag{Name: "bundle", Aliases: []string{"b"}, Usage: "directory to write it to; the current one by default"},
			&cli.BoolFlag{Name: "rootless", Usage: "not available: kilnrun needs root"},
		},
		Action: func(_ context.Context, c *cli.Command) error {
			if c.Bool("rootless") {
				return errors.New("--rootless: kilnrun needs root")
			}
			return writeSpec(c.String("bundle"))
		},
	}
}

// writeSpec writes the example, which replaces nothing.
func writeSpec(dir string) error {
	b, err := json.MarshalIndent(container.Example(), "", "\t")
	if err != nil {
		return err
	}
	name := "config.json"
	if dir != "" {
		name = dir + "/" + name
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if errors.Is(err, os.ErrExist) {
		return fmt.Errorf("file %s exists: remove it first", name)
	}
	if err != nil {
		return fmt.Errorf("write spec: %w", err)
	}
	_, err = f.Write(append(b, '\n'))
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write spec: %w", err)
	}
	return nil
}
