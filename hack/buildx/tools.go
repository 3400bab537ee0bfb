//go:build tools

// Package buildx pins docker's buildx, a real client of the end-to-end tests.
// `make buildx` builds it from the module cache; nothing of kiln imports this
// module.
package buildx

import (
	_ "github.com/docker/buildx/cmd/buildx"
)
