//go:build linux

package network

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestHostileConfig(t *testing.T) {
	for _, name := range []string{
		"a/b", "../x", ".", "..", "...", "a b", "a\nb", "a\x00b", "veth%d", "0123456789abcdef", "lo", "all", "default", "-x", "é", "a:b", `a"b`, "a;b", "a*",
	} {
		if err := (Config{Mode: Bridge, BridgeName: name}).Check(); err == nil || !strings.Contains(err.Error(), "bridge name") {
			t.Errorf("bridge name %q: %v", name, err)
		}
	}
	for _, name := range []string{"buildkit0", "br-1.2_x", "0123456789abcde", "."[:0]} {
		if err := (Config{Mode: Bridge, BridgeName: name}).Check(); err != nil {
			t.Errorf("bridge name %q: %v", name, err)
		}
	}
	for subnet, want := range map[string]string{
		"x": "prefix", "10.0.0.0": "prefix", "10.0.0.0/33": "prefix", "10.0.0.1/16": "10.0.0.0/16", "10.0.0.0/31": "no room", "10.0.0.0/32": "no room",
		"127.0.0.0/8": "private", "224.0.0.0/4": "private", "0.0.0.0/0": "private", "169.254.0.0/16": "private", "::1/128": "private", "fe80::/64": "private",
		"::ffff:10.0.0.0/112": "IPv4", "fd00::1/64": "fd00::/64", "fd00::/127": "no room", "10.1.0.0/16,10.2.0.0/16": "at most one", ",": "prefix",
		"10.1.0.0/16,fd00::/64,10.2.0.0/16": "at most one", "10.1.0.0/16;reboot": "prefix",
	} {
		if err := (Config{BridgeSubnet: subnet}).Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("subnet %q: error %v lacks %q", subnet, err, want)
		}
	}
	for _, size := range []int{-1, 1001} {
		if err := (Config{PoolSize: &size}).Check(); err == nil || !strings.Contains(err.Error(), fmt.Sprint(size)) {
			t.Errorf("pool size %d: %v", size, err)
		}
	}
	if err := (Config{Mode: "Bridge"}).Check(); err == nil || !strings.Contains(err.Error(), "bridge") {
		t.Errorf("mode Bridge: %v", err)
	}
}

// Every slot has an address of its own that isn't the network's, the bridge's
// or the one for broadcasts.
func TestSlots(t *testing.T) {
	for _, text := range []string{"10.0.0.0/30", "10.0.0.128/25", "10.0.0.248/29", "192.168.0.0/16", "10.0.0.0/8", "fd00::/126", "fd00::ff00/120", "fd00::/64", "fd00:1:2::ffff:fc00/118"} {
		s, err := parseSubnet(text)
		must(t, err)
		seen := map[netip.Addr]bool{s.Addr(): true, s.gateway(): true}
		for slot := range s.slots() {
			a := s.address(slot)
			if seen[a] || !s.Contains(a) {
				t.Fatalf("%s: slot %d has %s", text, slot, a)
			}
			seen[a] = true
		}
		if last := s.address(s.slots() - 1); s.Addr().Is4() && (!s.Contains(last.Next()) || s.slots() < 1) {
			t.Errorf("%s: the last slot has the address for broadcasts, %s", text, last)
		}
	}
}

func TestSlotsAreUsedAgainAsLateAsCanBe(t *testing.T) {
	s := slots{used: make([]bool, 3)}
	take := func() int {
		t.Helper()
		n, ok := s.take()
		if !ok {
			t.Fatal("no slot is left")
		}
		return n
	}
	first := take()
	s.put(first)
	if again := take(); again == first {
		t.Errorf("slot %d is used again at once", again)
	}
	take()
	if n := take(); n != first {
		t.Errorf("the last slot is %d, not %d", n, first)
	}
	if n, ok := s.take(); ok {
		t.Errorf("of 3 slots a fourth: %d", n)
	}
}

// What a kernel lacks is said once, not as its answer to each rule.
func TestKernelWithoutRules(t *testing.T) {
	answers := errors.Join(fmt.Errorf("receive: %w", unix.EOPNOTSUPP), unix.ENOENT, unix.ENOENT)
	err := lacking(answers)
	if !errors.Is(err, unix.EOPNOTSUPP) || !strings.HasPrefix(err.Error(), "this kernel has no nf_tables") || strings.Contains(err.Error(), "\n") {
		t.Errorf("error %v", err)
	}
	if got := lacking(unix.EPERM); got != unix.EPERM {
		t.Errorf("another error became %v", got)
	}
}

func TestHowManyAreMadeAhead(t *testing.T) {
	size := func(n int) *int { return &n }
	for name, c := range map[string]struct {
		cfg         Config
		least, most int
	}{
		"bridge":               {Config{Mode: Bridge}, 8, 32},
		"plugins":              {Config{Mode: CNI}, 4, 16},
		"as many as is wanted": {Config{Mode: CNI, PoolSize: size(100)}, 100, 100},
		"for few":              {Config{Mode: Bridge, Few: true}, 1, 1},
		"none, for few":        {Config{Mode: Bridge, Few: true, PoolSize: size(0)}, 0, 0},
	} {
		if n := c.cfg.ahead(); n < c.least || n > c.most {
			t.Errorf("%s: %d, not %d to %d", name, n, c.least, c.most)
		}
	}
}
