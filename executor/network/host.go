//go:build linux

package network

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
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

// lockInit takes the lock that keeps daemons from setting up networks at the
// same time, if there is one.
func lockInit() (unlock func() error, err error) {
	name := os.Getenv("BUILDKIT_CNI_INIT_LOCK_PATH")
	if name == "" {
		return func() error { return nil }, nil
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the lock BUILDKIT_CNI_INIT_LOCK_PATH: %w", err)
	}
	for {
		switch err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err {
		case nil:
			return f.Close, nil
		case unix.EINTR:
		default:
			f.Close() //nolint:errcheck // nothing was written
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
	}
}

func isTrue(text string) bool {
	b, err := strconv.ParseBool(text)
	return err == nil && b
}

func addrOf(ip net.IP) (netip.Addr, bool) {
	a, ok := netip.AddrFromSlice(ip)
	return a.Unmap(), ok
}
