package snapshot

import (
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A state directory inside a container is often on overlay, which can't be below
// overlay: it is said what helps.
func TestStateOnOverlay(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test needs root")
	}
	dir := t.TempDir()
	for _, sub := range []string{"lower", "upper", "work", "at"} {
		if err := os.Mkdir(dir+"/"+sub, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount("overlay", dir+"/at", "overlay", 0, "lowerdir="+dir+"/lower,upperdir="+dir+"/upper,workdir="+dir+"/work"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir+"/at", 0); err != nil {
			t.Error(err)
		}
	})
	_, err := probeOverlay(dir+"/at", false)
	if err == nil || !strings.Contains(err.Error(), dir+"/at") || !strings.Contains(err.Error(), "name a directory on another one with --root") {
		t.Errorf("error %v", err)
	}
}
