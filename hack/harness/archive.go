package harness

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/opencontainers/go-digest"
)

// CheckArchive compares the blobs of an OCI archive of an image with their
// digests. An image has at least a config, a manifest, an index and a layer.
func CheckArchive(path string) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	blobs := 0
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", path, err)
		}
		algorithm, hex, isBlob := strings.Cut(strings.TrimPrefix(h.Name, "blobs/"), "/")
		if !isBlob || h.Typeflag != tar.TypeReg {
			continue
		}
		blobs++
		got, err := digest.Algorithm(algorithm).FromReader(r)
		if err != nil || got.Encoded() != hex {
			return fmt.Errorf("%s in %s has the digest %s: %v", h.Name, path, got, err)
		}
	}
	if blobs < 3 {
		return fmt.Errorf("%s has %d blobs: no image", path, blobs)
	}
	return nil
}
