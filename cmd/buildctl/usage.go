package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/kilnbuild/kiln/client"
	control "github.com/moby/buildkit/api/services/control"
	"github.com/urfave/cli/v3"
)

func duCommand() *cli.Command {
	return &cli.Command{
		Name:  "du",
		Usage: "disk usage of the cache",
		Flags: []cli.Flag{
			&cli.StringSliceFlag{Name: "filter", Aliases: []string{"f"}, Usage: "records to list, such as type==source.local"},
			&cli.BoolFlag{Name: "verbose", Aliases: []string{"v"}, Usage: "everything about each record"},
			formatFlag,
		},
		DisableSliceFlagSeparator: true,
		Action: func(ctx context.Context, c *cli.Command) error {
			cl, err := connect(ctx, c)
			if err != nil {
				return err
			}
			defer cl.Close()
			records, err := cl.DiskUsage(ctx, c.StringSlice("filter")...)
			if err != nil {
				return err
			}
			if c.String("format") != "" {
				return printFormat(os.Stdout, c.String("format"), usageViews(records))
			}
			var report *client.UsageReport
			if c.Bool("verbose") {
				report, err = cl.UsageReport(ctx, c.StringSlice("filter")...)
				if err != nil && !errors.Is(err, client.ErrNoReport) {
					return err
				}
				printUsageVerbose(os.Stdout, records, report)
			} else if err := printUsageTable(os.Stdout, records); err != nil {
				return err
			}
			if len(c.StringSlice("filter")) > 0 {
				return nil
			}
			return errors.Join(printSpace(os.Stdout, report), printUsageSummary(os.Stdout, records))
		},
	}
}

func pruneCommand() *cli.Command {
	return &cli.Command{
		Name:  "prune",
		Usage: "remove unused cache records",
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "keep-duration", Usage: "keep what was used within this time"},
			&cli.FloatFlag{Name: "keep-storage", Usage: "keep the cache below this many MB"},
			&cli.FloatFlag{Name: "keep-storage-min", Usage: "never shrink the cache below this many MB"},
			&cli.FloatFlag{Name: "free-storage", Usage: "remove until this many MB of the disk are free"},
			&cli.StringSliceFlag{Name: "filter", Aliases: []string{"f"}, Usage: "records that may go"},
			&cli.BoolFlag{Name: "all", Usage: "internal and frontend records too"},
			&cli.BoolFlag{Name: "verbose", Aliases: []string{"v"}, Usage: "everything about each record"},
			formatFlag,
		},
		DisableSliceFlagSeparator: true,
		Action:                    runPrune,
	}
}

func runPrune(ctx context.Context, c *cli.Command) error {
	cl, err := connect(ctx, c)
	if err != nil {
		return err
	}
	defer cl.Close()
	const mb = 1e6
	opts := client.PruneOptions{
		Filters: c.StringSlice("filter"), All: c.Bool("all"), KeepDuration: c.Duration("keep-duration"),
		MaxUsedSpace:  int64(c.Float("keep-storage") * mb),
		ReservedSpace: int64(c.Float("keep-storage-min") * mb),
		MinFreeSpace:  int64(c.Float("free-storage") * mb),
	}
	tw := tabwriter.NewWriter(os.Stdout, 1, 8, 1, '\t', 0)
	var total int64
	var removed []*control.UsageRecord
	first := true
	err = cl.Prune(ctx, opts, func(r *control.UsageRecord) error {
		total += r.Size
		switch {
		case c.String("format") != "":
			removed = append(removed, r)
		case c.Bool("verbose"):
			printUsageVerbose(os.Stdout, []*control.UsageRecord{r}, nil)
		default:
			if first {
				fmt.Fprintln(tw, usageHeader)
				first = false
			}
			printUsageRow(tw, r)
			return tw.Flush()
		}
		return nil
	})
	if err != nil {
		return err
	}
	if c.String("format") != "" {
		return printFormat(os.Stdout, c.String("format"), usageViews(removed))
	}
	fmt.Fprintf(tw, "Total:\t%s\n", size(total))
	return tw.Flush()
}

const usageHeader = "ID\tRECLAIMABLE\tSIZE\tLAST ACCESSED"

func printUsageTable(w io.Writer, records []*control.UsageRecord) error {
	tw := tabwriter.NewWriter(w, 1, 8, 1, '\t', 0)
	fmt.Fprintln(tw, usageHeader)
	records = slices.Clone(records)
	slices.SortStableFunc(records, func(a, b *control.UsageRecord) int { return int(min(1, max(-1, b.Size-a.Size))) })
	for _, r := range records {
		printUsageRow(tw, r)
	}
	return tw.Flush()
}

func printUsageRow(w io.Writer, r *control.UsageRecord) {
	id, sz := r.ID, size(r.Size)
	if r.Mutable {
		id += "*"
	}
	if r.Shared {
		sz += "*"
	}
	last := ""
	if r.LastUsedAt != nil {
		last = units.HumanDuration(time.Since(r.LastUsedAt.AsTime())) + " ago"
	}
	fmt.Fprintf(w, "%-40s\t%-11v\t%s\t%s\n", id, !r.InUse, sz, last)
}

// printUsageVerbose adds to each record what report says of it, if there is one.
func printUsageVerbose(w io.Writer, records []*control.UsageRecord, report *client.UsageReport) {
	for _, r := range records {
		line := func(k string, v any) { fmt.Fprintf(w, "%-14s\t%v\n", k+":", v) }
		line("ID", r.ID)
		if len(r.Parents) > 0 {
			line("Parents", strings.Join(r.Parents, " "))
		}
		line("Created at", r.CreatedAt.AsTime().Local())
		line("Mutable", r.Mutable)
		line("Reclaimable", !r.InUse)
		line("Shared", r.Shared)
		line("Size", size(r.Size))
		if r.Description != "" {
			line("Description", r.Description)
		}
		line("Usage count", r.UsageCount)
		if r.LastUsedAt != nil {
			line("Last used", r.LastUsedAt.AsTime().Local())
		}
		if r.RecordType != "" {
			line("Type", r.RecordType)
		}
		if report != nil {
			d := report.Records[r.ID]
			line("Used by", cmp.Or(strings.Join(d.Users, ", "), "nothing"))
			line("Removed by", removedBy(d))
		}
		fmt.Fprintln(w)
	}
}

func removedBy(d client.RecordDetail) string {
	switch {
	case d.Rule == "":
		return "prune only"
	case d.Due:
		return d.Rule + ", at the next pass"
	}
	return d.Rule + ", not yet due"
}

// printSpace says where the bytes of the state directory are.
func printSpace(w io.Writer, report *client.UsageReport) error {
	if report == nil {
		return nil
	}
	tw := tabwriter.NewWriter(w, 1, 8, 1, '\t', 0)
	total := int64(0)
	fmt.Fprintln(tw, "ON DISK\tSIZE")
	for _, p := range report.Space {
		total += p.Bytes
		fmt.Fprintf(tw, "%s\t%s\n", p.Name, size(p.Bytes))
	}
	fmt.Fprintf(tw, "State directory\t%s\n\n", size(total))
	return tw.Flush()
}

func printUsageSummary(w io.Writer, records []*control.UsageRecord) error {
	var total, reclaimable, shared, private int64
	for _, r := range records {
		if r.Size <= 0 {
			continue
		}
		total += r.Size
		if !r.InUse {
			reclaimable += r.Size
		}
		if r.Shared {
			shared += r.Size
		} else {
			private += r.Size
		}
	}
	tw := tabwriter.NewWriter(w, 1, 8, 1, '\t', 0)
	if shared > 0 {
		fmt.Fprintf(tw, "Shared:\t%s\nPrivate:\t%s\n", size(shared), size(private))
	}
	fmt.Fprintf(tw, "Reclaimable:\t%s\nTotal:\t%s\n", size(reclaimable), size(total))
	return tw.Flush()
}

func size(n int64) string { return units.HumanSizeWithPrecision(float64(n), 3) }

// usageView is a record in the form of its JSON (BCL-061).
type usageView struct {
	ID          string     `json:"id"`
	Mutable     bool       `json:"mutable"`
	InUse       bool       `json:"inUse"`
	Size        int64      `json:"size"`
	CreatedAt   time.Time  `json:"createdAt"`
	LastUsedAt  *time.Time `json:"lastUsedAt"`
	UsageCount  int        `json:"usageCount"`
	Parents     []string   `json:"parents"`
	Description string     `json:"description"`
	RecordType  string     `json:"recordType"`
	Shared      bool       `json:"shared"`
}

func usageViews(records []*control.UsageRecord) []usageView {
	out := make([]usageView, len(records))
	for i, r := range records {
		out[i] = usageView{
			ID: r.ID, Mutable: r.Mutable, InUse: r.InUse, Size: r.Size, CreatedAt: r.CreatedAt.AsTime(),
			UsageCount: int(r.UsageCount), Parents: r.Parents, Description: r.Description, RecordType: r.RecordType, Shared: r.Shared,
		}
		if r.LastUsedAt != nil {
			t := r.LastUsedAt.AsTime()
			out[i].LastUsedAt = &t
		}
	}
	return out
}
