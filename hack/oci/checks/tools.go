//go:build tools

// Package checks pins runtime-tools, the OCI community's checks of runtimes.
// The tests of hack/oci build its programs from the module cache; nothing of
// kiln imports this module.
package checks

import (
	_ "github.com/opencontainers/runtime-tools/cmd/runtimetest"
	_ "github.com/opencontainers/runtime-tools/validation/create"
)
