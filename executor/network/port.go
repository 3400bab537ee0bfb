//go:build linux

package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"strconv"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// innerName is the interface's name in the namespace.
const innerName = "eth0"

// connect makes a namespace that is connected to b.
func (b *bridge) connect(context.Context) (*Namespace, error) {
	p := &port{bridge: b}
	n, err := create(p.add)
	if err != nil {
		return nil, errors.Join(err, p.remove())
	}
	n.port = p
	return n, nil
}

// port connects one namespace.
type port struct {
	*bridge
	link *netlink.Veth // the machine's end; nil if it isn't there
	slot int           // valid if there is a link
}

// linkName tells the port in a slot from all others on the machine.
func (b *bridge) linkName(slot int) string {
	return "k" + b.owner.String() + "-" + strconv.FormatInt(int64(slot), 36)
}

// add adds the port. It runs in the namespace.
func (p *port) add(n *Namespace) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("connect it to bridge %s: %w", p.bridge.name, err)
		}
	}()
	if p.has4only() {
		if err := sysctl("ipv6/conf/default/disable_ipv6", "1"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := p.addLink(n); err != nil {
		return err
	}
	// First the inner end: the port is in use as soon as both are up.
	if err := p.setUpInside(); err != nil {
		return err
	}
	if err := p.host.LinkSetUp(p.link); err != nil {
		return fmt.Errorf("set link %s up: %w", p.link.Name, err)
	}
	return p.introduce()
}

// addLink adds both ends, and makes the outer one a port that learns nothing
// and reaches no other.
func (p *port) addLink(n *Namespace) error {
	if err := p.addToSlot(n); err != nil {
		return err
	}
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"add it to the bridge", func() error { return p.host.LinkSetMasterByIndex(p.link, p.bridge.link.Index) }},
		{"isolate it", func() error { return p.host.LinkSetIsolated(p.link, true) }},
		{"stop it from learning addresses", func() error { return p.host.LinkSetLearning(p.link, false) }},
	} {
		if err := step.do(); err != nil {
			return fmt.Errorf("link %s: %s: %w", p.link.Name, step.name, err)
		}
	}
	return nil
}

// addToSlot adds both ends in the next slot that is free. Whether another member
// has it is known by the name of its link.
func (p *port) addToSlot(n *Namespace) error {
	var taken []int
	full := errExhausted
	defer func() {
		for _, slot := range taken {
			p.slots.put(slot)
		}
	}()
	for {
		slot, ok := p.slots.take()
		if !ok {
			return full
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.Group = p.linkName(slot), p.owner.group()
		link := &netlink.Veth{LinkAttrs: attrs, PeerName: innerName, PeerHardwareAddr: hardwareAddr(slot), PeerNamespace: netlink.NsFd(n.FD())}
		err := p.host.LinkAdd(link)
		if err == nil {
			p.link, p.slot = link, slot
			return nil
		}
		taken = append(taken, slot)
		if !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add link %s: %w", attrs.Name, err)
		}
		full = errElsewhere
	}
}

// setUpInside gives the inner end its addresses and routes.
func (p *port) setUpInside() error {
	inside, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer inside.Close()
	eth, err := inside.LinkByName(innerName)
	if err != nil {
		return fmt.Errorf("find %s: %w", innerName, err)
	}
	if err := inside.LinkSetUp(eth); err != nil {
		return fmt.Errorf("set %s up: %w", innerName, err)
	}
	index := eth.Attrs().Index
	for _, s := range p.subnets {
		addr := s.address(p.slot)
		if err := inside.AddrAdd(eth, &netlink.Addr{IPNet: s.ipNet(addr), Flags: noDAD(s)}); err != nil {
			return fmt.Errorf("give %s the address %s: %w", innerName, addr, err)
		}
		if err := inside.NeighSet(neighbor(index, s.gateway(), p.owner.hardwareAddr())); err != nil {
			return fmt.Errorf("introduce the gateway %s: %w", s.gateway(), err)
		}
		if err := inside.RouteAdd(&netlink.Route{LinkIndex: index, Gw: s.gateway().AsSlice()}); err != nil {
			return fmt.Errorf("add default route by %s: %w", s.gateway(), err)
		}
	}
	return nil
}

// introduce tells bridge and machine what is behind the port.
func (p *port) introduce() error {
	mac := hardwareAddr(p.slot)
	err := p.host.NeighSet(&netlink.Neigh{
		LinkIndex: p.link.Index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_MASTER, State: netlink.NUD_NOARP, HardwareAddr: mac,
	})
	if err != nil {
		return fmt.Errorf("add %s to the table of the bridge: %w", mac, err)
	}
	for _, s := range p.subnets {
		if err := p.host.NeighSet(neighbor(p.bridge.link.Index, s.address(p.slot), mac)); err != nil {
			return fmt.Errorf("add neighbor %s: %w", s.address(p.slot), err)
		}
	}
	return nil
}

// neighbor is an entry that no packet changes.
func neighbor(link int, addr netip.Addr, mac net.HardwareAddr) *netlink.Neigh {
	return &netlink.Neigh{LinkIndex: link, State: netlink.NUD_PERMANENT, IP: addr.AsSlice(), HardwareAddr: mac}
}

// leave has the port deleted with its group.
func (p *port) leave() error {
	if err := p.forget(); err != nil {
		return err
	}
	if err := p.host.LinkSetGroup(p.link, int(p.owner.goingGroup())); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("link %s: mark it for removal: %w", p.link.Name, err)
	}
	return nil
}

// remove removes what there is of a port that wasn't made whole, and frees its
// slot.
func (p *port) remove() error {
	if p.link == nil {
		return nil
	}
	if err := errors.Join(p.forget(), deleteLink(p.host, p.link)); err != nil {
		return err
	}
	p.slots.put(p.slot)
	return nil
}

// forget has the machine forget what is behind the port.
func (p *port) forget() error {
	for _, s := range p.subnets {
		err := p.host.NeighDel(neighbor(p.bridge.link.Index, s.address(p.slot), hardwareAddr(p.slot)))
		if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("remove neighbor %s: %w", s.address(p.slot), err)
		}
	}
	return nil
}
