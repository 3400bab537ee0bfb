//go:build e2e

package e2e

import (
	"testing"

	"github.com/kilnbuild/kiln/hack/testimage"
)

// pushXattrImage puts an image into the registry whose files carry extended
// attributes, hard links, and deletions of a lower layer.
func pushXattrImage(t *testing.T) {
	t.Helper()
	img, err := testimage.Busybox()
	if err != nil {
		t.Fatal(err)
	}
	// cap_net_raw+ep, as setcap writes it.
	capNetRaw := "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	img.Layers = append(img.Layers, []testimage.File{
		{Name: "bin/cap", Mode: 0o755, Data: []byte("c"), Xattrs: map[string]string{"security.capability": capNetRaw, "user.a": "1"}},
		{Name: "bin/caplink", HardLink: "bin/cap"},
		{Name: "bin/.wh.vi", Mode: 0},
		{Name: "home/.wh..wh..opq", Mode: 0},
		{Name: "home/user/", Mode: 0o700, UID: 1000, GID: 1000},
	})
	l, err := img.Write(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Push(env.registry, "test/xattrs", "latest"); err != nil {
		t.Fatal(err)
	}
}
