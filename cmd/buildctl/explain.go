package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"time"

	"github.com/urfave/cli/v3"
)

func explainCommand() *cli.Command {
	return &cli.Command{
		Name:      "explain",
		Usage:     "say why the steps of a build ran",
		ArgsUsage: "[REF]",
		Description: "buildctl explain says of each step of the last build that ran what changed since it ran before.\n" +
			"REF is the id of another build, such as --ref-file writes it. buildctl build --opt kiln.explain=1\n" +
			"shows the reasons while the build runs.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "all", Usage: "steps from the cache, too"},
			&cli.BoolFlag{Name: "json", Usage: "everything, as JSON"},
		},
		Action: runExplain,
	}
}

func runExplain(ctx context.Context, c *cli.Command) error {
	if c.Args().Len() > 1 {
		return fmt.Errorf("one build can be explained, not %d: %q", c.Args().Len(), c.Args().Slice())
	}
	cl, err := connect(ctx, c)
	if err != nil {
		return err
	}
	defer cl.Close()
	b, err := cl.Explain(ctx, c.Args().First())
	if err != nil {
		return err
	}
	if c.Bool("json") {
		enc := json.NewEncoder(os.Stdout)
		enc.SetIndent("", "  ")
		return enc.Encode(b)
	}
	return b.Write(os.Stdout, c.Bool("all"), time.Now())
}
