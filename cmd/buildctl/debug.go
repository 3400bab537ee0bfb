package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"text/template"
	"time"

	"github.com/containerd/platforms"
	apitypes "github.com/moby/buildkit/api/types"
	"github.com/urfave/cli/v3"
)

var formatFlag = &cli.StringFlag{Name: "format", Usage: "Go template for the output, such as '{{json .}}'"}

// printFormat executes a user's template on data.
func printFormat(w io.Writer, format string, data any) error {
	tmpl, err := template.New("format").Funcs(template.FuncMap{
		"json": func(v any) (string, error) {
			b, err := json.Marshal(v)
			return string(b), err
		},
	}).Parse(format)
	if err != nil {
		return fmt.Errorf("--format: %w", err)
	}
	if err := tmpl.Execute(w, data); err != nil {
		return fmt.Errorf("--format: %w", err)
	}
	_, err = fmt.Fprintln(w)
	return err
}

func debugCommand() *cli.Command {
	return &cli.Command{
		Name:    "debug",
		Usage:   "look at the daemon",
		Suggest: true,
		Commands: []*cli.Command{
			{
				Name:  "workers",
				Usage: "list workers",
				Flags: []cli.Flag{
					&cli.StringSliceFlag{Name: "filter", Aliases: []string{"f"}, Usage: "workers to list, such as labels.\"k\"==v"},
					&cli.BoolFlag{Name: "verbose", Aliases: []string{"v"}, Usage: "everything about each worker"},
					formatFlag,
				},
				DisableSliceFlagSeparator: true,
				Action:                    runWorkers,
			},
			debugExecCommand(),
			{Name: "info", Usage: "version of the daemon", Flags: []cli.Flag{formatFlag}, Action: runInfo},
		},
	}
}

func runInfo(ctx context.Context, c *cli.Command) error {
	cl, err := connect(ctx, c)
	if err != nil {
		return err
	}
	defer cl.Close()
	v, err := cl.Info(ctx)
	if err != nil {
		return err
	}
	if f := c.String("format"); f != "" {
		return printFormat(os.Stdout, f, map[string]any{"buildkitVersion": map[string]string{
			"package": v.Package, "version": v.Version, "revision": v.Revision, "dockerfileVersion": v.DockerfileVersion,
		}})
	}
	_, err = fmt.Printf("BuildKit:\t%s %s %s\nDockerfile:\t%s\n", v.Package, v.Version, v.Revision, v.DockerfileVersion)
	return err
}

func runWorkers(ctx context.Context, c *cli.Command) error {
	cl, err := connect(ctx, c)
	if err != nil {
		return err
	}
	defer cl.Close()
	workers, err := cl.ListWorkers(ctx, c.StringSlice("filter")...)
	if err != nil {
		return err
	}
	tw := tabwriter.NewWriter(os.Stdout, 1, 8, 1, '\t', 0)
	switch {
	case c.String("format") != "":
		return printFormat(os.Stdout, c.String("format"), workers)
	case c.Bool("verbose"):
		for _, w := range workers {
			printWorker(tw, w)
		}
	default:
		fmt.Fprintln(tw, "ID\tPLATFORMS")
		for _, w := range workers {
			fmt.Fprintf(tw, "%s\t%s\n", w.ID, platformList(w))
		}
	}
	return tw.Flush()
}

func printWorker(w io.Writer, rec *apitypes.WorkerRecord) {
	fmt.Fprintf(w, "ID:\t%s\nPlatforms:\t%s\nBuildKit:\t%s %s %s\nLabels:\n", rec.ID, platformList(rec),
		rec.BuildkitVersion.GetPackage(), rec.BuildkitVersion.GetVersion(), rec.BuildkitVersion.GetRevision())
	for _, k := range slices.Sorted(maps.Keys(rec.Labels)) {
		fmt.Fprintf(w, "\t%s:\t%s\n", k, rec.Labels[k])
	}
	for i, p := range rec.GCPolicy {
		fmt.Fprintf(w, "GC Policy rule#%d:\n\tAll:\t%v\n", i, p.All)
		if len(p.Filters) > 0 {
			fmt.Fprintf(w, "\tFilters:\t%s\n", strings.Join(p.Filters, " "))
		}
		if p.KeepDuration > 0 {
			fmt.Fprintf(w, "\tKeep Duration:\t%s\n", time.Duration(p.KeepDuration))
		}
		fmt.Fprintf(w, "\tReserved space:\t%s\n\tMaximum used space:\t%s\n\tMinimum free space:\t%s\n",
			size(p.ReservedSpace), size(p.MaxUsedSpace), size(p.MinFreeSpace))
	}
	fmt.Fprintln(w)
}

func platformList(w *apitypes.WorkerRecord) string {
	var out []string
	for _, p := range w.Platforms {
		out = append(out, platforms.Format(platforms.Normalize(p.Spec())))
	}
	return strings.Join(out, ",")
}

func dialStdioCommand() *cli.Command {
	return &cli.Command{
		Name:   "dial-stdio",
		Usage:  "connect stdin and stdout with the daemon's socket",
		Action: runDialStdio,
	}
}

// runDialStdio passes bytes both ways; the end of stdin is passed on while
// answers still come (BCL-064).
func runDialStdio(ctx context.Context, c *cli.Command) error {
	cl, err := connect(ctx, c)
	if err != nil {
		return err
	}
	addr := cl.Addr()
	if err := cl.Close(); err != nil {
		return err
	}
	proto, rest, _ := strings.Cut(addr, "://")
	conn, err := (&net.Dialer{}).DialContext(ctx, proto, rest)
	if err != nil {
		return fmt.Errorf("connect to %s: %w", addr, err)
	}
	defer conn.Close()
	failed := make(chan error, 2)
	go func() {
		_, err := io.Copy(conn, os.Stdin)
		if half, ok := conn.(interface{ CloseWrite() error }); ok && err == nil {
			err = half.CloseWrite()
		}
		if err != nil {
			failed <- fmt.Errorf("copy stdin to %s: %w", addr, err)
		}
	}()
	go func() {
		_, err := io.Copy(os.Stdout, conn)
		if err != nil {
			err = fmt.Errorf("copy %s to stdout: %w", addr, err)
		}
		failed <- err
	}()
	// Once the daemon is gone, what stdin still holds has no reader.
	return <-failed
}
