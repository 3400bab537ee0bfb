//go:build linux

package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strconv"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
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
	name string // of the machine's end; "" if it isn't there
	slot int    // valid if there is a link
}

// linkName tells the port in a slot from all others on the machine.
func (b *bridge) linkName(slot int) string {
	return "k" + b.owner.String() + "-" + strconv.FormatInt(int64(slot), 36)
}

// add adds the port. It runs in the namespace. First comes the inner end: the
// port is in use as soon as both are up.
func (p *port) add(n *Namespace) error {
	err := p.quiet()
	if err == nil {
		err = p.addLink(n)
	}
	if err == nil {
		err = p.setUpInside()
	}
	if err == nil {
		err = p.setUpOutside()
	}
	if err != nil {
		return fmt.Errorf("connect it to bridge %s: %w", p.bridge.name, err)
	}
	return nil
}

// quiet has links in the namespace send nothing of their own accord, so that it
// shows whether a process did.
func (p *port) quiet() error {
	key := "accept_ra" // as nobody asks for routers then
	value := "0"
	if p.has4only() {
		key, value = "disable_ipv6", "1"
	}
	if err := sysctl("ipv6/conf/default/"+key, value); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// addLink adds both ends in the next slot that is free, the outer one as a port of
// the bridge. Whether another member has a slot is known by the name of its link.
func (p *port) addLink(n *Namespace) error {
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
		name := p.linkName(slot)
		err := p.rtnl.do(p.newLink(name, slot, n))
		if err == nil {
			p.name, p.slot = name, slot
			return nil
		}
		taken = append(taken, slot)
		if !errors.Is(err, unix.EEXIST) {
			return err
		}
		full = errElsewhere
	}
}

// newLink has one queue at each end, where the kernel makes one for each processor
// of the machine: they take time and memory, and are of no use without an
// interface's own queues behind them.
func (p *port) newLink(name string, slot int, n *Namespace) change {
	one := nl.Uint32Attr(1)
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("veth"))
	peer := info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(nl.VETH_INFO_PEER, nil)
	peer.AddChild(linkNumber(0))
	peer.AddChild(linkNamed(innerName))
	peer.AddRtAttr(unix.IFLA_ADDRESS, hardwareAddr(slot))
	peer.AddRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(n.FD())))
	peer.AddRtAttr(unix.IFLA_NUM_TX_QUEUES, one)
	peer.AddRtAttr(unix.IFLA_NUM_RX_QUEUES, one)
	return newChange("add link "+name, unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL,
		linkNumber(0), linkNamed(name), info,
		nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(p.owner.group())),
		nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(p.bridge.link.Index))),
		nl.NewRtAttr(unix.IFLA_NUM_TX_QUEUES, one), nl.NewRtAttr(unix.IFLA_NUM_RX_QUEUES, one))
}

// setUpInside gives the inner end its addresses and routes.
func (p *port) setUpInside() (err error) {
	inside, err := openRtnl()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, inside.close()) }()
	index, err := inside.index(innerName)
	if err != nil {
		return err
	}
	changes := []change{linkUp(innerName, index)}
	for _, s := range p.subnets {
		changes = append(changes,
			addressAdd(index, s.prefix(s.address(p.slot))),
			neighborAdd(index, s.gateway(), p.owner.hardwareAddr()),
			defaultRoute(index, s.gateway()))
	}
	return inside.do(changes...)
}

// setUpOutside makes the outer end a port that learns nothing and reaches no
// other, and tells bridge and machine what is behind it.
func (p *port) setUpOutside() error {
	index, err := p.rtnl.index(p.name)
	if err != nil {
		return err
	}
	ofBridge := linkNumber(index)
	ofBridge.Family = unix.AF_BRIDGE
	flags := nl.NewRtAttr(unix.IFLA_PROTINFO|unix.NLA_F_NESTED, nil)
	flags.AddRtAttr(nl.IFLA_BRPORT_ISOLATED, []byte{1})
	flags.AddRtAttr(nl.IFLA_BRPORT_LEARNING, []byte{0})
	mac := hardwareAddr(p.slot)
	changes := []change{
		newChange("isolate "+p.name+", and stop it from learning addresses", unix.RTM_SETLINK, 0, ofBridge, flags),
		newChange(fmt.Sprintf("add %s to the table of the bridge", mac), unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE,
			&netlink.Ndmsg{Family: unix.AF_BRIDGE, Index: uint32(index), Flags: netlink.NTF_MASTER, State: netlink.NUD_NOARP},
			nl.NewRtAttr(netlink.NDA_LLADDR, mac)),
	}
	for _, s := range p.subnets {
		changes = append(changes, neighborAdd(p.bridge.link.Index, s.address(p.slot), mac))
	}
	return p.rtnl.do(append(changes, linkUp(p.name, index))...)
}

// leave has the port deleted with its group.
func (p *port) leave() error {
	return p.rtnl.do(append(p.forget(), linkGroup(p.name, p.owner.goingGroup()).ifThere())...)
}

// remove removes what there is of a port that wasn't made whole, and frees its
// slot.
func (p *port) remove() error {
	if p.name == "" {
		return nil
	}
	if err := p.rtnl.do(append(p.forget(), linkDelete(p.name).ifThere())...); err != nil {
		return err
	}
	p.slots.put(p.slot)
	return nil
}

// forget has the machine forget what is behind the port.
func (p *port) forget() (changes []change) {
	for _, s := range p.subnets {
		changes = append(changes, neighborDelete(p.bridge.link.Index, s.address(p.slot)).ifThere())
	}
	return changes
}
