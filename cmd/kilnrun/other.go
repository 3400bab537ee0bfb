//go:build !linux || !(amd64 || arm64)

// Command kilnrun is kiln's container runtime with the command line of runc.
package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "kilnrun: containers need Linux on amd64 or arm64")
	os.Exit(1)
}
