package supervisor

import (
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// Only who listens counts, not who has left a directory or a socket.
func TestPids(t *testing.T) {
	dir := t.TempDir()
	if pids := Pids(filepath.Join(dir, "missing")); len(pids) > 0 {
		t.Errorf("of no directory: %v", pids)
	}
	for _, name := range []string{"alive", "dead", "empty"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	listen := func(name string) *net.UnixListener {
		t.Helper()
		var l *net.UnixListener
		if err := socketAt(filepath.Join(dir, name), func(path string) (err error) {
			l, err = net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
			return err
		}); err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		return l
	}
	defer listen("alive").Close()
	if err := listen("dead").Close(); err != nil {
		t.Fatal(err)
	}
	if pids := Pids(dir); !slices.Equal(pids, []int{os.Getpid()}) {
		t.Errorf("%v, not %d", pids, os.Getpid())
	}
}
