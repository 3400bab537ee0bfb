//go:build linux

package network

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
)

// sysctl sets a value of the calling thread's network namespace, if it isn't
// set already: where /proc/sys is read-only, that may have been done outside.
func sysctl(key, value string) error {
	file := "/proc/sys/net/" + key
	old, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("read network setting: %w", err)
	}
	if string(bytes.TrimSpace(old)) == value {
		return nil
	}
	if err := os.WriteFile(file, []byte(value), 0); err != nil {
		return fmt.Errorf("change network setting to %s: %w", value, err)
	}
	return nil
}

// forward makes the machine pass on packets of the subnets.
func forward(subnets []subnet) error {
	for _, s := range subnets {
		key := "ipv4/ip_forward"
		if !s.Addr().Is4() {
			key = "ipv6/conf/all/forwarding"
		}
		if err := sysctl(key, "1"); err != nil {
			return fmt.Errorf("let packets of %s pass: %w", s, err)
		}
	}
	return nil
}

func isTrue(text string) bool {
	b, err := strconv.ParseBool(text)
	return err == nil && b
}

func addrOf(ip net.IP) (netip.Addr, bool) {
	a, ok := netip.AddrFromSlice(ip)
	return a.Unmap(), ok
}
