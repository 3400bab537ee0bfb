//go:build linux

package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"

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
	*membership
	name    string
	owner   owner
	subnets []subnet
	slots   slots
	host    *netlink.Handle
	rtnl    *rtnl // the machine's
	link    *netlink.Bridge
	pool    *pool
}

func openBridge(dir string, cfg Config, log *slog.Logger) (_ *bridge, err error) {
	b := &bridge{name: cfg.BridgeName}
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
	if b.host, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	if b.rtnl, err = openRtnl(); err != nil {
		b.host.Close()
		return nil, err
	}
	b.membership, err = join(dir, func(alone bool) error {
		if !alone {
			return b.share()
		}
		if err := removeLeft(dir, cfg, log); err != nil {
			return err
		}
		if err := b.setUp(); err != nil {
			return errors.Join(err, removeBridge(dir))
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(err, b.closeNetlink())
	}
	// What waits for use in a small subnet leaves room for other members.
	b.pool = newPool(poolConfig{
		make: b.connect, remove: b.remove, ahead: min(cfg.ahead(), room/8), keep: min(remembered, room/4), makers: makers(), log: log,
	})
	return b, nil
}

// setUp makes the bridge and its rules. What it has made when it fails is the
// caller's to remove.
func (b *bridge) setUp() error {
	unlock, err := lockInit()
	if err != nil {
		return err
	}
	defer unlock()
	if err := b.checkFree(); err != nil {
		return err
	}
	if err := b.addLink(); err != nil {
		return err
	}
	if err := forward(b.subnets); err != nil {
		return err
	}
	return addRules(b.owner, b.name, b.subnets)
}

// share finds the bridge that another member has made.
func (b *bridge) share() error {
	link, err := b.host.LinkByName(b.name)
	if err != nil {
		return b.differs(err)
	}
	br, ok := link.(*netlink.Bridge)
	if !ok || !bytes.Equal(br.HardwareAddr, b.owner.hardwareAddr()) {
		return b.differs(fmt.Errorf("link %s is another", b.name))
	}
	addrs, err := b.host.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list the addresses of bridge %s: %w", b.name, err)
	}
	for _, s := range b.subnets {
		if !slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.IPNet.String() == s.ipNet(s.gateway()).String() }) {
			return b.differs(fmt.Errorf("it hasn't the address %s", s.ipNet(s.gateway())))
		}
	}
	b.link = br
	return nil
}

func (b *bridge) differs(err error) error {
	return fmt.Errorf("steps of an earlier daemon still run on a bridge that isn't %s with %v; go back to its bridgeName and bridgeSubnet, or wait for them to end: %w", b.name, b.subnets, err)
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

func (b *bridge) Take(ctx context.Context, u User) (*Namespace, error) {
	n, err := b.pool.Take(ctx, u.Asks)
	if errors.Is(err, errExhausted) {
		err = fmt.Errorf("no address is left in the bridge's subnet %s, which has %d for steps that run at once; set a larger bridgeSubnet, or max-parallelism: %w", b.subnets[0], len(b.slots.used), err)
	}
	return n, err
}

func (b *bridge) Close() error {
	b.pool.halt()
	err := b.leave(func(alone bool) error {
		if alone {
			return removeBridge(b.dir) // all links at once, not one by one
		}
		return nil
	})
	return errors.Join(err, b.pool.drop(), b.closeNetlink())
}

func (b *bridge) closeNetlink() error {
	b.host.Close()
	return b.rtnl.close()
}

// removeBridge removes the links and rules that are of dir, as far as they are
// there. No step is on the bridge.
func removeBridge(dir string) error {
	owner, err := ownerOf(dir)
	if err != nil {
		return err
	}
	return errors.Join(deleteGroup(owner.group()), deleteGroup(owner.goingGroup()), removeRules(owner))
}

// remove disconnects namespaces, even such as somebody keeps alive, and unmakes
// them. All are disconnected at once: to delete links takes the kernel 13 ms at
// least, for one as for a hundred, in which nobody else can change any.
func (b *bridge) remove(all []*Namespace) error {
	var errs []error
	var going []*port
	for _, n := range all {
		if err := n.port.leave(); err != nil {
			errs = append(errs, err)
		} else {
			going = append(going, n.port)
		}
	}
	if len(going) > 0 {
		if err := deleteGroup(b.owner.goingGroup()); err != nil {
			errs, going = append(errs, err), nil
		}
	}
	for _, p := range going {
		p.slots.put(p.slot)
	}
	for _, n := range all {
		errs = append(errs, n.close())
	}
	return errors.Join(errs...)
}

// deleteGroup deletes all links of a group, of which there may be none.
func deleteGroup(group uint32) error {
	req := nl.NewNetlinkRequest(unix.RTM_DELLINK, unix.NLM_F_ACK)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(group)))
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove the links of group %d: %w", group, err)
	}
	return nil
}
