//go:build tools

// Package peer pins upstream's buildctl, the real client of the end-to-end
// tests, and buildkitd, the peer of the benchmarks. `make peer` builds both
// from the module cache; nothing of kiln imports this module.
package peer

import (
	_ "github.com/moby/buildkit/cmd/buildctl"
	_ "github.com/moby/buildkit/cmd/buildkitd"
)
