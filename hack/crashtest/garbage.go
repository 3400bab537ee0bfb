package crashtest

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/kilnbuild/kiln/client"
	control "github.com/moby/buildkit/api/services/control"
)

const (
	// kept is how long what was used isn't collected as garbage. What is younger
	// and gone is lost.
	kept = 30 * time.Second
	// mostUsed is when garbage is collected: always.
	mostUsed = 1 << 20
)

// daemonConfig is the end of the daemon's kilnd.toml. The steps of one that is
// alone end with it.
func daemonConfig(alone bool) string {
	conf := fmt.Sprintf("[[worker.oci.gcpolicy]]\nall = true\nkeepDuration = %q\nmaxUsedSpace = %d\n[registry.%q]\nhttp = true\n", kept, mostUsed, "127.0.0.1")
	if alone {
		conf += "[kiln]\nunclaimedStepTimeout = 0\n"
	}
	return conf
}

// prune has the daemon at addr remove what its garbage collection would.
func prune(ctx context.Context, addr string) (removed int, err error) {
	c, err := client.New(addr, client.Options{})
	if err != nil {
		return 0, err
	}
	err = c.Prune(ctx, client.PruneOptions{All: true, KeepDuration: kept, MaxUsedSpace: mostUsed}, func(*control.UsageRecord) error {
		removed++
		return nil
	})
	return removed, errors.Join(err, c.Close())
}
