package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/kilnbuild/kiln/worker"
	"github.com/urfave/cli/v3"
)

func fsckCommand() *cli.Command {
	return &cli.Command{
		Name:  "fsck",
		Usage: "check the state directory of a daemon that isn't running",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "root", Usage: "path to state directory", Value: defaultRoot},
			&cli.BoolFlag{Name: "deep", Usage: "also read every blob and compare its digest"},
		},
		Action: func(ctx context.Context, c *cli.Command) error {
			report, err := worker.Check(ctx, c.String("root"), c.Bool("deep"))
			if err != nil {
				return err
			}
			for _, p := range report.Problems {
				fmt.Fprintln(os.Stderr, p)
			}
			fmt.Println(report)
			if len(report.Problems) > 0 {
				return errors.New("the state directory is damaged; kilnd repairs what it can when it starts")
			}
			return nil
		},
	}
}
