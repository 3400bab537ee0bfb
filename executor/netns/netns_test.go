//go:build linux

package netns

import (
	"log/slog"
	"os"
	"runtime"
	"testing"

	"github.com/kilnbuild/kiln/executor/thread"
	"golang.org/x/sys/unix"
)

func inode(t *testing.T, f *os.File) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func TestPool(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it makes network namespaces")
	}
	own, err := os.Open("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	p := New(slog.New(slog.DiscardHandler))
	seen := map[uint64]bool{inode(t, own): true}
	for range 3 * ahead { // more than are made ahead
		f, err := p.Take()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if seen[inode(t, f)] {
			t.Error("a namespace was handed out twice, or is the machine's")
		}
		seen[inode(t, f)] = true
		thread.Run(func() { checkLoopback(t, f) })
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	// No thread that goroutines use is left in another namespace.
	for range 10 {
		runtime.LockOSThread()
		now, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		if inode(t, now) != inode(t, own) {
			t.Error("a thread is in another namespace")
		}
		now.Close()
		runtime.UnlockOSThread()
	}
}

func checkLoopback(t *testing.T, ns *os.File) {
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		t.Error(err)
		return
	}
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Error(err)
		return
	}
	defer unix.Close(s)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		t.Error(err)
		return
	}
	if err := unix.IoctlIfreq(s, unix.SIOCGIFFLAGS, ifr); err != nil || ifr.Uint16()&unix.IFF_UP == 0 {
		t.Errorf("loopback has flags %#x, %v", ifr.Uint16(), err)
	}
}
