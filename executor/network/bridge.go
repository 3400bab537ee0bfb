//go:build linux

package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/kilnbuild/kiln/internal/cleanup"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// bridge connects namespaces to a bridge in the machine's network, from where
// packets go on with the machine's address. Each namespace is a port:
//
//	namespace                machine
//	eth0 10.10.0.7  ──────  k<owner>-<n>  ──┐
//	eth0 10.10.0.8  ──────  k<owner>-<n>  ──┴─ buildkit0 10.10.0.1 ── masquerade ── eth0
//
// Ports reach the machine and what is behind it, never each other. What
// addresses are behind a port is said when it is made and not learned from
// packets, so that no step gets those for another by claiming its address.
type bridge struct {
	name    string
	owner   owner
	subnets []subnet
	slots   slots
	host    *netlink.Handle
	link    *netlink.Bridge
	dir     string
	pool    *pool
}

// marker is the file that tells of a bridge. It is made before and removed after
// everything else.
func marker(dir string) string { return filepath.Join(dir, "bridge") }

func openBridge(dir string, cfg Config, log *slog.Logger) (_ *bridge, err error) {
	b := &bridge{name: cfg.BridgeName, dir: dir}
	if b.owner, err = ownerOf(dir); err != nil {
		return nil, err
	}
	if b.subnets, err = parseSubnets(cfg.BridgeSubnet); err != nil {
		return nil, err
	}
	room := maxSlots
	for _, s := range b.subnets {
		room = min(room, s.slots())
	}
	b.slots.used = make([]bool, room)

	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	unlock, err := lockInit()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	if b.host, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	undo.AddFunc(b.host.Close)
	if err := b.checkFree(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("remember the bridge: %w", err)
	}
	if err := os.WriteFile(marker(dir), nil, 0o600); err != nil {
		return nil, fmt.Errorf("remember the bridge: %w", err)
	}
	undo.Add(func() error { return removeBridge(b.owner, dir) })
	if err := b.addLink(); err != nil {
		return nil, err
	}
	if err := forward(b.subnets); err != nil {
		return nil, err
	}
	if err := addRules(b.owner, b.name, b.subnets); err != nil {
		return nil, err
	}
	warnOfDrops(b.name, log)
	undo.Keep()
	// In a small subnet there is room left for what isn't made ahead.
	b.pool = newPool(min(cfg.ahead(), room), log, b.connect)
	return b, nil
}

// checkFree refuses to share a link or addresses with somebody else.
func (b *bridge) checkFree() error {
	switch link, err := b.host.LinkByName(b.name); {
	case err == nil:
		return fmt.Errorf("the machine has a link %s already, a %s that isn't this daemon's; if nothing uses it, remove it (ip link delete %[1]s), or set another bridgeName",
			b.name, link.Type())
	case !errors.As(err, new(netlink.LinkNotFoundError)):
		return fmt.Errorf("look for link %s: %w", b.name, err)
	}
	addrs, err := b.host.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list the machine's addresses: %w", err)
	}
	for _, a := range addrs {
		for _, s := range b.subnets {
			if ip, ok := addrOf(a.IP); ok && s.Contains(ip) {
				return fmt.Errorf("the machine has the address %s, which is in the bridge's subnet %s; set another bridgeSubnet", ip, s)
			}
		}
	}
	return nil
}

// addLink adds the bridge with its addresses.
func (b *bridge) addLink() error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr, attrs.Group = b.name, b.owner.hardwareAddr(), b.owner.group()
	snooping := false // nothing goes from port to port, not even multicast
	b.link = &netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}
	if err := b.host.LinkAdd(b.link); err != nil {
		return fmt.Errorf("add bridge %s: %w", b.name, err)
	}
	if b.has4only() {
		if err := sysctl("ipv6/conf/"+b.name+"/disable_ipv6", "1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	for _, s := range b.subnets {
		if err := b.host.AddrAdd(b.link, &netlink.Addr{IPNet: s.ipNet(s.gateway()), Flags: noDAD(s)}); err != nil {
			return fmt.Errorf("give bridge %s the address %s: %w", b.name, s.gateway(), err)
		}
	}
	if err := b.host.LinkSetUp(b.link); err != nil {
		return fmt.Errorf("set bridge %s up: %w", b.name, err)
	}
	return nil
}

func (b *bridge) has4only() bool { return len(b.subnets) == 1 && b.subnets[0].Addr().Is4() }

// noDAD: an address is ready at once, since nobody else can have it.
func noDAD(s subnet) int {
	if s.Addr().Is4() {
		return 0
	}
	return unix.IFA_F_NODAD
}

func (b *bridge) Take(ctx context.Context, _ string) (*Namespace, error) {
	n, err := b.pool.Take(ctx)
	if errors.Is(err, errExhausted) {
		return nil, fmt.Errorf("no address is left in the bridge's subnet %s: %d steps run at once; set a larger bridgeSubnet, or max-parallelism", b.subnets[0], len(b.slots.used))
	}
	return n, err
}

func (b *bridge) Close() error {
	b.pool.halt()
	err := errors.Join(removeBridge(b.owner, b.dir), b.pool.drop()) // all links at once, not one by one
	b.host.Close()
	return err
}

// removeLeftBridge removes what a crashed daemon left. No step of it runs.
func removeLeftBridge(dir string) error {
	if _, err := os.Stat(marker(dir)); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	owner, err := ownerOf(dir)
	if err != nil {
		return err
	}
	return removeBridge(owner, dir)
}

// removeBridge removes the links and rules of owner, as far as they are there.
func removeBridge(owner owner, dir string) error {
	if err := errors.Join(deleteGroup(owner), removeRules(owner)); err != nil {
		return err
	}
	return os.Remove(marker(dir))
}

// deleteGroup deletes all links of owner at once, which takes the kernel hardly
// longer than to delete one.
func deleteGroup(owner owner) error {
	req := nl.NewNetlinkRequest(unix.RTM_DELLINK, unix.NLM_F_ACK)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(owner.group())))
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove the links of group %d: %w", owner.group(), err)
	}
	return nil
}

// deleteLink is content if it is gone already.
func deleteLink(host *netlink.Handle, link netlink.Link) error {
	if err := host.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove link %s: %w", link.Attrs().Name, err)
	}
	return nil
}
