// Command kilnd is the build daemon: flags, config, listeners and wiring. The
// work is done by the packages below.
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/moby/buildkit/util/apicaps"
)

func main() {
	apicaps.ExportedProduct = "kiln" // named in errors about missing capabilities
	if err := command().Run(context.Background(), os.Args); err != nil {
		fmt.Fprintf(os.Stderr, "kilnd: %v\n", err)
		os.Exit(1)
	}
}
