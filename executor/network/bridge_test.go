//go:build linux

package network

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Without the machine's address on their packets, nobody outside would find the
// way back.
func TestBridgeReachesWhatIsBehindTheMachine(t *testing.T) {
	world := outside(t)
	serve(t, world, "192.0.2.2:80", "four")
	serve(t, world, "[2001:db8::2]:80", "six")
	for _, c := range []struct {
		subnet, gateway4, gateway6 string
	}{
		{"10.10.0.0/16", "10.10.0.1", ""},
		{"fd00:1::/64", "", "fd00:1::1"},
		{"10.11.0.0/24, fd00:2::/120", "10.11.0.1", "fd00:2::1"},
	} {
		t.Run(c.subnet, func(t *testing.T) {
			n := open(t, t.TempDir(), Config{Mode: Bridge, BridgeSubnet: c.subnet, BridgeName: "br.test"})
			ns := take(t, n.Default)
			defer ns.Release()
			if c.gateway4 != "" {
				answers(t, ns, "192.0.2.2:80", "four to 192.0.2.1")
				serve(t, nil, c.gateway4+":8080", "machine")
				answers(t, ns, c.gateway4+":8080", "machine to "+address(t, ns, netlink.FAMILY_V4).String())
			}
			if c.gateway6 != "" {
				answers(t, ns, "[2001:db8::2]:80", "six to 2001:db8::1")
				serve(t, nil, "["+c.gateway6+"]:8080", "machine")
				answers(t, ns, "["+c.gateway6+"]:8080", "machine to "+address(t, ns, netlink.FAMILY_V6).String())
			}
			serve(t, ns, "127.0.0.1:1234", "loopback")
			answers(t, ns, "127.0.0.1:1234", "loopback to 127.0.0.1")
		})
	}
}

func TestStepsDoNotReachEachOther(t *testing.T) {
	world := outside(t)
	n := open(t, t.TempDir(), Config{Mode: Bridge})
	a, b := take(t, n.Default), take(t, n.Default)
	defer a.Discard()
	defer b.Discard()
	ip := address(t, a, netlink.FAMILY_V4)
	addr := net.JoinHostPort(ip.String(), "80")
	serve(t, a, addr, "a")
	answers(t, nil, addr, "a to 10.10.0.1") // so that it can be reached at all

	silent(t, b, addr)
	// Nor by way of the machine.
	in(t, b, func() {
		link, err := netlink.LinkByName(innerName)
		if err == nil {
			owner := n.Default.(*bridge).owner
			err = netlink.NeighSet(&netlink.Neigh{LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: ip, HardwareAddr: owner.hardwareAddr()})
		}
		if err != nil {
			t.Error(err)
		}
	})
	silent(t, b, addr)
	// Nor from outside, even by who knows the way.
	in(t, world, func() {
		_, dst, _ := net.ParseCIDR("10.10.0.0/16")
		if err := netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: net.IPv4(192, 0, 2, 1)}); err != nil {
			t.Error(err)
		}
	})
	silent(t, world, addr)
}

// A step that takes another's addresses, as insecure ones can, doesn't get what
// is meant for the other.
func TestStepsDoNotPassForEachOther(t *testing.T) {
	n := open(t, t.TempDir(), Config{Mode: Bridge})
	a, b := take(t, n.Default), take(t, n.Default)
	defer a.Discard()
	defer b.Discard()
	ip := address(t, a, netlink.FAMILY_V4)
	addr := net.JoinHostPort(ip.String(), "80")
	in(t, a, func() { // its own address is known before
		c, err := net.Dial("udp", "10.10.0.1:9")
		if err == nil {
			_, err = c.Write([]byte("x"))
			c.Close()
		}
		if err != nil {
			t.Error(err)
		}
	})
	in(t, b, func() {
		link, err := netlink.LinkByName(innerName)
		if err == nil {
			err = netlink.LinkSetHardwareAddr(link, hardwareAddr(n.Default.(*bridge).slotOf(t, a)))
		}
		if err == nil {
			err = netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: ip, Mask: net.CIDRMask(16, 32)}})
		}
		if err != nil {
			t.Error(err)
			return
		}
		d := net.Dialer{LocalAddr: &net.UDPAddr{IP: ip}}
		c, err := d.Dial("udp", "10.10.0.1:9")
		if err == nil {
			_, err = c.Write([]byte("x"))
			c.Close()
		}
		if err != nil {
			t.Error(err)
		}
	})
	serve(t, a, addr, "a")
	serve(t, b, addr, "b")
	answers(t, nil, addr, "a to 10.10.0.1")
}

// slotOf is the slot of a namespace's address.
func (b *bridge) slotOf(t testing.TB, n *Namespace) int {
	t.Helper()
	ip, _ := addrOf(address(t, n, netlink.FAMILY_V4))
	for slot := range b.slots.used {
		if b.subnets[0].address(slot) == ip {
			return slot
		}
	}
	t.Fatalf("%s is of no slot", ip)
	return 0
}

func TestNoAddressIsLeft(t *testing.T) {
	two := 2
	n := open(t, t.TempDir(), Config{Mode: Bridge, BridgeSubnet: "10.12.0.0/29", PoolSize: &two})
	seen := map[string]bool{}
	var all []*Namespace
	for range 5 { // of 8 without the network's, the bridge's and the one for broadcasts
		ns := take(t, n.Default)
		all = append(all, ns)
		ip := address(t, ns, netlink.FAMILY_V4).String()
		if seen[ip] {
			t.Errorf("%s was given twice", ip)
		}
		seen[ip] = true
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("gone")
	cancel(gone)
	_, err := n.Default.Take(ctx, User{})
	if !errors.Is(err, gone) {
		t.Fatalf("one waits for a sixth address until it is gone: %v", err)
	}
	for _, want := range []string{"10.12.0.0/29", "bridgeSubnet", "has 5"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q lacks %q", err, want)
		}
	}
	// Steps that ended make room, whether the namespace can be used again or not.
	all[0].Release()
	all[0] = take(t, n.Default)
	all[1].Discard()
	all[1] = take(t, n.Default)
	for _, ns := range all {
		ns.Release()
	}
}

func TestBridgeRefusesWhatIsNotItsOwn(t *testing.T) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "theirs0"
	theirs := &netlink.Bridge{LinkAttrs: attrs}
	must(t, netlink.LinkAdd(theirs))
	t.Cleanup(func() { must(t, netlink.LinkDel(theirs)) })
	configure(t, "theirs0", "10.13.1.1/24")
	before := machine(t)
	for _, c := range []struct {
		cfg  Config
		want []string
	}{
		{Config{Mode: Bridge, BridgeName: "theirs0", BridgeSubnet: "10.14.0.0/16"}, []string{"theirs0", "bridgeName"}},
		{Config{Mode: Bridge, BridgeSubnet: "10.13.0.0/16"}, []string{"10.13.1.1", "10.13.0.0/16", "bridgeSubnet"}},
	} {
		dir := t.TempDir()
		_, err := Open(dir, c.cfg, discard)
		if err == nil {
			t.Fatalf("%+v was accepted", c.cfg)
		}
		for _, want := range c.want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%q lacks %q", err, want)
			}
		}
		if after := machine(t); after != before {
			t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
		}
		if _, err := os.Stat(usersFile(dir)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a file tells of a bridge that there isn't: %v", err)
		}
	}
}

// Rules that are there already are replaced, and missing ones not missed.
func TestRulesOfAnotherRun(t *testing.T) {
	dir := t.TempDir()
	o, err := ownerOf(filepath.Clean(dir))
	must(t, err)
	before := machine(t)
	subnets, err := parseSubnets("10.15.0.0/16")
	must(t, err)
	must(t, addRules(o, "gone0", subnets))
	n, err := Open(dir, Config{Mode: Bridge}, discard)
	must(t, err)
	must(t, n.Close())
	if after := machine(t); after != before {
		t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
	}
	must(t, removeRules(o))
}

// idle waits until nothing is under way in a pool.
func idle(t testing.TB, p *pool) {
	t.Helper()
	must(t, p.await(t.Context(), func() bool {
		return p.busy == 0 && len(p.old) == 0 && p.settling == 0 && (p.ahead == 0 || p.totalLocked() >= p.wantedLocked() || p.failed)
	}))
}

// A used namespace is used again only if nothing is in it.
func TestUseAgain(t *testing.T) {
	zero := 0
	n := open(t, t.TempDir(), Config{Mode: Bridge, PoolSize: &zero})
	ns := take(t, n.Default)
	used := identity(t, ns)
	release := func() {
		ns.Release()
		idle(t, n.Default.(*bridge).pool)
	}
	clean(t, ns)
	release()
	if ns = take(t, n.Default); inode(t, ns.FD()) != used {
		t.Error("a clean namespace was not used again")
	}
	var fd int
	var err error
	in(t, ns, func() { fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0) })
	must(t, err)
	release()
	if ns = take(t, n.Default); inode(t, ns.FD()) == used {
		t.Error("a namespace was used again in which somebody has a socket")
	}
	must(t, unix.Close(fd))
	used = identity(t, ns)
	ns.Discard()
	if ns = take(t, n.Default); inode(t, ns.FD()) == used {
		t.Error("a namespace was used again that must not be")
	}
	ns.Release()
}

// A namespace in which anything was sent isn't used again: the kernel tells whom
// it went to, and what answers may still come.
func TestWhatHasSentIsNotUsedAgain(t *testing.T) {
	world := outside(t)
	zero := 0
	n := open(t, t.TempDir(), Config{Mode: Bridge, PoolSize: &zero})
	var l net.Listener
	var err error
	in(t, world, func() { l, err = net.Listen("tcp", "192.0.2.2:80") })
	must(t, err)
	t.Cleanup(func() { must(t, l.Close()) })
	connect := func(first, second func(here, there net.Conn) net.Conn) func() {
		return func() {
			here, err := net.Dial("tcp", "192.0.2.2:80")
			if err != nil {
				t.Error(err)
				return
			}
			there, err := l.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			must(t, first(here, there).Close())
			if _, err := second(here, there).Read(make([]byte, 1)); err != io.EOF {
				t.Error(err)
			}
			must(t, second(here, there).Close())
		}
	}
	this := func(here, _ net.Conn) net.Conn { return here }
	other := func(_, there net.Conn) net.Conn { return there }
	send := func(addr string) func() {
		return func() {
			c, err := net.Dial("udp", addr)
			if err == nil {
				_, err = c.Write([]byte("x"))
				err = errors.Join(err, c.Close())
			}
			if err != nil {
				t.Error(err)
			}
		}
	}
	for name, touch := range map[string]func(){
		"closed here first":    connect(this, other), // which remembers the connection for a while
		"closed there first":   connect(other, this),
		"a packet to nobody":   send("10.10.9.9:9"),
		"a packet to the step": send("127.0.0.1:9"),
	} {
		t.Run(name, func(t *testing.T) {
			ns := take(t, n.Default)
			used := identity(t, ns)
			in(t, ns, touch)
			ns.Release()
			idle(t, n.Default.(*bridge).pool)
			if ns = take(t, n.Default); inode(t, ns.FD()) == used {
				t.Error("the namespace is used again")
			}
			ns.Release()
		})
	}
}

func TestSent(t *testing.T) {
	const head = "Inter-|   Receive   |  Transmit\n face |bytes    packets|bytes    packets\n"
	stat := head + "    lo: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n  eth0:101 2 3 4 5 6 7 8 9 10 11 12 13 14 15 17\n"
	for text, want := range map[string]string{
		stat:                     "    lo 9 10 11 12 13 14 15 16\n  eth0 9 10 11 12 13 14 15 17\n",
		head:                     "",
		head + "lo: 1 2 3 4 5\n": "",
		"":                       "",
	} {
		if got := sent([]byte(text)); got != want {
			t.Errorf("%q: %q", text, got)
		}
	}
}

func TestNoSockets(t *testing.T) {
	for text, want := range map[string]bool{
		"sockets: used 0\nTCP: inuse 0 orphan 0 tw 0 alloc 3 mem 1\nUDP: inuse 0 mem 0\n": true,
		"sockets: used 1\nTCP: inuse 0 orphan 0 tw 0 alloc 3 mem 1\n":                     false,
		"sockets: used 10\n":           false,
		"sockets: used x\n":            false,
		"TCP: inuse 0 orphan 0 tw 0\n": false,
		"":                             false,
	} {
		if got := noSockets([]byte(text)); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}
