//go:build linux

package network

import (
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

// A daemon and what still runs for an earlier one are on the same bridge, each
// with its own steps, and the last removes it.
func TestTwoShareABridge(t *testing.T) {
	world := outside(t)
	serve(t, world, "192.0.2.2:80", "world")
	before := machine(t)
	dir := t.TempDir()
	cfg := Config{Mode: Bridge, BridgeSubnet: "10.16.0.0/28"}
	first, err := Open(dir, cfg, discard)
	must(t, err)
	second, err := Open(dir, cfg, discard)
	must(t, err)
	seen := map[string]bool{}
	var used []*Namespace
	for range 3 {
		for _, n := range []*Networks{first, second} {
			ns := take(t, n.Default)
			used = append(used, ns)
			answers(t, ns, "192.0.2.2:80", "world to 192.0.2.1")
			ip := address(t, ns, netlink.FAMILY_V4).String()
			if seen[ip] {
				t.Errorf("%s was given twice", ip)
			}
			seen[ip] = true
		}
	}
	other := cfg
	other.BridgeSubnet = "10.17.0.0/16"
	if _, err := Open(dir, other, discard); err == nil || !strings.Contains(err.Error(), "earlier daemon") {
		t.Errorf("another subnet for the same bridge: %v", err)
	}
	other = cfg
	other.BridgeName = "other0"
	if _, err := Open(dir, other, discard); err == nil || !strings.Contains(err.Error(), "other0") {
		t.Errorf("another name for the same bridge: %v", err)
	}
	host, err := Open(dir, Config{}, discard)
	must(t, err)
	must(t, host.Close())
	for _, ns := range used {
		ns.Release()
	}
	ns := take(t, second.Default)
	must(t, first.Close())
	answers(t, ns, "192.0.2.2:80", "world to 192.0.2.1")
	ns.Release()
	must(t, second.Close())
	if after := machine(t); after != before {
		t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("files left behind: %v %v", left, err)
	}
}

// One that was killed doesn't take the network of those that live.
func TestOneOfTwoIsKilled(t *testing.T) {
	before := machine(t)
	dir := t.TempDir()
	n, err := Open(dir, Config{Mode: Bridge}, discard)
	must(t, err)
	crash(t, dir, Config{Mode: Bridge})
	ns := take(t, n.Default)
	serve(t, nil, "10.10.0.1:8080", "machine")
	answers(t, ns, "10.10.0.1:8080", "machine to "+address(t, ns, netlink.FAMILY_V4).String())
	third, err := Open(dir, Config{Mode: Bridge}, discard)
	must(t, err)
	must(t, third.Close())
	answers(t, ns, "10.10.0.1:8080", "machine to "+address(t, ns, netlink.FAMILY_V4).String())
	ns.Release()
	must(t, n.Close())
	if after := machine(t); after != before {
		t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
	}
}

func TestTwoShareCNI(t *testing.T) {
	cfg, calls := cniConfig(t, "net.json", false)
	dir := t.TempDir()
	first, err := Open(dir, cfg, discard)
	must(t, err)
	other, _ := cniConfig(t, "other.conflist", false)
	second, err := Open(dir, other, discard)
	must(t, err)
	ns := take(t, first.Default)
	must(t, second.Close())
	if _, err := os.Stat(ns.Path()); err != nil {
		t.Errorf("the last to come took away what another uses: %v", err)
	}
	ns.Release()
	must(t, first.Close())
	if got := calls(); !strings.HasPrefix(got[len(got)-1], "DEL") {
		t.Errorf("calls: %s", got)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("files left behind: %v %v", left, err)
	}
}
