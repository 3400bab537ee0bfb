//go:build linux && (amd64 || arm64)

package native

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseMountOptions(t *testing.T) {
	o, err := parseMountOptions("bind", []string{"rbind", "ro", "nosuid", "rw", "rnoexec", "rslave", "size=4k"})
	if err != nil {
		t.Fatal(err)
	}
	if !o.bind || !o.rec || o.flags != unix.MS_NOSUID || o.set != unix.MOUNT_ATTR_NOSUID || o.clear != unix.MOUNT_ATTR_RDONLY ||
		o.setRec != unix.MOUNT_ATTR_NOEXEC || len(o.propagation) != 1 || strings.Join(o.data, ",") != "size=4k" {
		t.Errorf("%+v", o)
	}
	for _, bad := range []string{"tmpcopyup", "idmap", "idmap=uids=0-1-2", "ridmap"} {
		if _, err := parseMountOptions("tmpfs", []string{bad}); err == nil {
			t.Errorf("%s is taken", bad)
		}
	}
}
