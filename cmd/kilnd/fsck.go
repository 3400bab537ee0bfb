package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/kilnbuild/kiln/internal/rootless"
	"github.com/kilnbuild/kiln/worker"
	"github.com/urfave/cli/v3"
)

func fsckCommand() *cli.Command {
	return &cli.Command{
		Name:  "fsck",
		Usage: "check the state directory of a daemon that isn't running",
		Description: "Checks every page of the database and the journal, every record with its parents, snapshots and blobs, and every cache key, " +
			"and prints counts. Nothing is changed without --repair. The state directory is that of --root or of the config file, as the daemon's.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "deep", Usage: "also read every blob and compare its digest, and measure every snapshot"},
			&cli.BoolFlag{Name: "repair", Usage: "rebuild a damaged database, drop what has lost its files, and check again"},
		},
		Action: fsck,
	}
}

func fsck(ctx context.Context, c *cli.Command) error {
	// The state directory is the daemon's, however that is told of it.
	cfg, _, err := loadConfig(c)
	if err != nil {
		return err
	}
	root, deep := cfg.Root, c.Bool("deep")
	if err := rootless.Enter(); err != nil {
		return err
	}
	if err := rootless.Check(root); err != nil {
		return err
	}
	report, err := check(ctx, root, deep)
	if err != nil {
		return err
	}
	if c.Bool("repair") {
		done, err := worker.Repair(ctx, root, deep)
		for _, d := range done {
			fmt.Println("repair:", d)
		}
		if err != nil {
			return fmt.Errorf("repair %s: %w", root, err)
		}
		if report, err = check(ctx, root, deep); err != nil {
			return err
		}
	}
	switch {
	case len(report.Problems) == 0:
		return nil
	case c.Bool("repair"):
		return errors.New("the state directory is still damaged")
	}
	return errors.New("the state directory is damaged; kilnd fsck --deep --repair mends it")
}

// check prints what is found.
func check(ctx context.Context, root string, deep bool) (worker.Report, error) {
	report, err := worker.Check(ctx, root, deep)
	if err != nil {
		return report, err
	}
	for _, p := range report.Problems {
		fmt.Fprintln(os.Stderr, p)
	}
	fmt.Println(report)
	return report, nil
}
