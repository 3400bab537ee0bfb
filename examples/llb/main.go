// Command llb prints a small LLB definition to standard output, to be built
// with:
//
//	go run ./examples/llb | buildctl build --output type=local,dest=out
//
// An argument names another base image than busybox of Docker Hub.
package main

import (
	"fmt"
	"os"

	"github.com/kilnbuild/kiln/client/llb"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "llb:", err)
		os.Exit(1)
	}
}

func run() error {
	base := "docker.io/library/busybox:latest"
	if len(os.Args) > 1 {
		base = os.Args[1]
	}
	def, err := hello(base).Marshal()
	if err != nil {
		return err
	}
	return llb.WriteTo(def, os.Stdout)
}

// hello is a directory with a greeting, written by a command that logs its runs
// in a cache that outlives the build, merged with a file made from nothing.
func hello(image string) llb.State {
	cmd := llb.Image(image).Run(
		llb.Shlex(`sh -c 'echo "hello from $(uname -m)" | tee /out/hello; date >> /cache/log; cat /cache/log'`),
		llb.AddMount("/cache", llb.Scratch(), llb.AsPersistentCacheDir("hello", llb.CacheMountLocked)),
		llb.WithCustomName("say hello"),
	)
	out := cmd.AddMount("/out", llb.Scratch())

	readme := llb.Mkdir("/docs", 0o755).
		Mkfile("/docs/README", 0o644, []byte("made without a Dockerfile\n"))
	return llb.Merge([]llb.State{out, llb.Scratch().File(readme)})
}
