//go:build linux

package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
)

// maxSlots bounds how many namespaces a subnet has room for: a bridge has at
// most 1023 ports.
const maxSlots = 1000

// subnet is the addresses of one family on a bridge: the first one is the
// bridge's, the others are those of slots.
type subnet struct{ netip.Prefix }

// parseSubnets reads one or two prefixes.
func parseSubnets(text string) ([]subnet, error) {
	var out []subnet
	for part := range strings.SplitSeq(text, ",") {
		s, err := parseSubnet(strings.TrimSpace(part))
		if err != nil {
			return nil, err
		}
		if len(out) > 0 && (len(out) > 1 || out[0].Addr().Is4() == s.Addr().Is4()) {
			return nil, fmt.Errorf("%q: at most one prefix of IPv4 and one of IPv6", text)
		}
		out = append(out, s)
	}
	return out, nil
}

func parseSubnet(text string) (subnet, error) {
	p, err := netip.ParsePrefix(text)
	if err != nil {
		return subnet{}, fmt.Errorf("%q is no prefix such as %s: %w", text, defaultBridgeSubnet, err)
	}
	a := p.Addr()
	switch {
	case a.Is4In6():
		return subnet{}, fmt.Errorf("%s: write it as an IPv4 prefix", p)
	case p.Masked() != p:
		return subnet{}, fmt.Errorf("%s has bits set beyond its length; is %s meant?", p, p.Masked())
	case a.IsLoopback() || a.IsMulticast() || a.IsUnspecified() || a.IsLinkLocalUnicast():
		return subnet{}, fmt.Errorf("%s: steps can't have such addresses; take some of a private network", p)
	case p.Bits() > a.BitLen()-2:
		return subnet{}, fmt.Errorf("%s has no room for steps: its length must be %d or less", p, a.BitLen()-2)
	}
	return subnet{p}, nil
}

// slots is how many namespaces have room.
func (s subnet) slots() int {
	host := s.Addr().BitLen() - s.Bits()
	if host > 16 {
		return maxSlots
	}
	return min(1<<host-3, maxSlots) // without network, gateway, broadcast
}

// gateway is the bridge's address.
func (s subnet) gateway() netip.Addr { return s.Addr().Next() }

// address is that of a slot, which is counted from 0.
func (s subnet) address(slot int) netip.Addr {
	b := s.gateway().As16()
	// Slots fit into the low bits, whatever the gateway has there.
	low := binary.BigEndian.Uint32(b[12:])
	binary.BigEndian.PutUint32(b[12:], low+1+uint32(slot))
	a := netip.AddrFrom16(b)
	if s.Addr().Is4() {
		return a.Unmap()
	}
	return a
}

// prefix is an address with the length of the subnet's.
func (s subnet) prefix(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, s.Bits()) }

// ipNet is an address with the subnet's mask.
func (s subnet) ipNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(s.Bits(), a.BitLen())}
}

// hardwareAddr is that of the interface in a slot.
func hardwareAddr(slot int) net.HardwareAddr {
	mac := net.HardwareAddr{0x0a, 0x4c, 0, 0, 0, 0} // locally administered
	binary.BigEndian.PutUint32(mac[2:], uint32(slot))
	return mac
}

// slots hands out numbers below a bound, those returned last as late as can be:
// the machine may still have connections of the last user.
type slots struct {
	mu   sync.Mutex // guards the fields below
	used []bool
	next int
}

func (s *slots) take() (slot int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for range s.used {
		slot := s.next
		s.next = (s.next + 1) % len(s.used)
		if !s.used[slot] {
			s.used[slot] = true
			return slot, true
		}
	}
	return 0, false
}

func (s *slots) put(slot int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used[slot] = false
}

// maxLinkName is the kernel's IFNAMSIZ without the final zero.
const maxLinkName = 15

// checkLinkName accepts what the kernel, nft and file systems take as a name.
func checkLinkName(name string) error {
	switch {
	case name == "" || len(name) > maxLinkName:
		return fmt.Errorf("must have 1 to %d characters", maxLinkName)
	case strings.Trim(name, ".") == "" || name == "all" || name == "default" || name == "lo":
		return errors.New("the kernel means something else by this name")
	}
	for _, c := range []byte(name) {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !letter && c != '-' && c != '_' && c != '.' {
			return fmt.Errorf("%q is not allowed: use letters, digits, '-', '_' and '.'", c)
		}
	}
	if name[0] == '-' {
		return errors.New("must not begin with '-'")
	}
	return nil
}
