// Command baseimage makes a base image as an OCI layout and prints its digest:
// the small busybox one that the demo builds on, or one of a root file system.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"

	"github.com/kilnbuild/kiln/hack/testimage"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func main() {
	out := flag.String("o", "", "directory of the OCI layout to write")
	rootfs := flag.String("rootfs", "", "tar of a root file system; busybox if empty")
	flag.Parse()
	if err := run(*out, *rootfs); err != nil {
		fmt.Fprintln(os.Stderr, "baseimage:", err)
		os.Exit(1)
	}
}

func run(out, rootfs string) error {
	if out == "" {
		return errors.New("say with -o where the OCI layout goes")
	}
	img := testimage.Image{Tar: rootfs, Config: ocispec.ImageConfig{
		Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, Cmd: []string{"bash"},
	}}
	if rootfs == "" {
		var err error
		if img, err = testimage.Busybox(); err != nil {
			return err
		}
	}
	l, err := img.Write(out)
	if err != nil {
		return err
	}
	fmt.Println(l.Manifest.Digest)
	return nil
}
