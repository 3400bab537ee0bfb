//go:build linux && (amd64 || arm64)

package executor

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/kilnbuild/kiln/executor/network"
	"golang.org/x/sys/unix"
)

// inOwnNetwork runs the test that calls it once more, in a network where it may
// do what it likes, and reports whether it is there.
func inOwnNetwork(t *testing.T) bool {
	t.Helper()
	needRoot(t)
	const inside = "KILN_TEST_OWN_NETWORK"
	if os.Getenv(inside) == t.Name() {
		return true
	}
	cmd := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), inside+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	// The child ends with the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("in a network of its own: %v\n%s", err, out)
	} else if !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("in a network of its own it didn't run:\n%s", out)
	}
	return false
}

func TestBridgeNetwork(t *testing.T) {
	if !inOwnNetwork(t) {
		return
	}
	for name, binary := range runtimes {
		t.Run(name, func(t *testing.T) {
			e := newTest(t, Config{Binary: binary, Network: network.Config{Mode: network.Bridge, BridgeSubnet: "10.77.0.0/16"}})
			l, err := net.Listen("tcp", "10.77.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return // closed
					}
					io.WriteString(c, "hello") //nolint:errcheck // the step misses it
					c.Close()
				}
			}()
			port := l.Addr().(*net.TCPAddr).Port
			run := func(net NetMode, security SecurityMode, script string) string {
				t.Helper()
				p := process(t, script)
				p.Network, p.Security = net, security
				return output(t, e, p)
			}
			if got := run(NetSandbox, SecuritySandbox, fmt.Sprintf("nc 10.77.0.1 %d", port)); got != "hello" {
				t.Errorf("from the bridge a step reads %q", got)
			}
			if got := run(NetSandbox, SecuritySandbox, "ls /sys/class/net; ip route | head -n 1"); got != "eth0\nlo\ndefault via 10.77.0.1 dev eth0 \n" {
				t.Errorf("on the bridge a step has %q", got)
			}
			if got := run(NetHost, SecuritySandbox, "ls /sys/class/net | grep buildkit0"); got != "buildkit0\n" {
				t.Errorf("in the machine's network a step sees %q", got)
			}
			if got := run(NetNone, SecuritySandbox, "ls /sys/class/net"); got != "lo\n" {
				t.Errorf("without network a step has %q", got)
			}
			// What an insecure step has changed no other step finds.
			before := run(NetSandbox, SecuritySandbox, "readlink /proc/self/ns/net")
			changed := run(NetSandbox, SecurityInsecure, "ip addr add 10.77.9.9/32 dev eth0 && readlink /proc/self/ns/net")
			if after := run(NetSandbox, SecuritySandbox, "ip addr show eth0 | grep -c inet; readlink /proc/self/ns/net"); !strings.HasPrefix(after, "1\n") || strings.Contains(after, changed) {
				t.Errorf("namespaces of three steps, the second of which changes its own: %s%s%s", before, changed, after)
			}
		})
	}
}

func TestNoNetworkAtAll(t *testing.T) {
	e := newTest(t, Config{Network: network.Config{Mode: network.None}})
	if got := output(t, e, process(t, "ls /sys/class/net")); got != "lo\n" {
		t.Errorf("a step has %q", got)
	}
}

func TestBadNetwork(t *testing.T) {
	needRoot(t)
	for want, cfg := range map[string]network.Config{
		"wlan":   {Mode: "wlan"},
		"a/b":    {Mode: network.Bridge, BridgeName: "a/b"},
		"/no/it": {Mode: network.CNI, CNIConfig: "/no/it", CNIBinaries: "/"},
	} {
		if _, err := New(Config{Root: t.TempDir(), Network: cfg}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: error %v lacks %q", cfg, err, want)
		}
	}
}
