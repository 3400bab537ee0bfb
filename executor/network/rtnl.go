//go:build linux

package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// rtnl changes links, addresses and routes in the namespace of the thread that
// has opened it. The netlink package sends one message at a time and takes new
// memory of 64 kB for each answer, which is half of what a port costs.
type rtnl struct {
	mu  sync.Mutex // guards the fields below, from a message to its answer
	fd  int
	buf []byte
}

func openRtnl() (*rtnl, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	return &rtnl{fd: fd, buf: make([]byte, 8<<10)}, nil
}

func (r *rtnl) close() error { return unix.Close(r.fd) }

// change is a message to the kernel.
type change struct {
	*nl.NetlinkRequest
	what string // it does, for people
	gone bool   // it is content if what it is about isn't there
}

// do makes changes in their order. One that fails doesn't keep those after it from
// being made.
func (r *rtnl) do(changes ...change) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	last := changes[len(changes)-1]
	last.Flags |= unix.NLM_F_ACK // of the others only failures are answered
	var msgs []byte
	for _, c := range changes {
		msgs = append(msgs, c.Serialize()...)
	}
	if err := unix.Sendto(r.fd, msgs, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("%s: send to netlink: %w", changes[0].what, err)
	}
	var errs []error
	for {
		// All answers are there when the message was sent.
		n, _, err := unix.Recvfrom(r.fd, r.buf, unix.MSG_DONTWAIT)
		if err != nil {
			return errors.Join(append(errs, fmt.Errorf("%s: receive from netlink: %w", last.what, err))...)
		}
		answers, err := syscall.ParseNetlinkMessage(r.buf[:n])
		if err != nil {
			return errors.Join(append(errs, fmt.Errorf("%s: answer of netlink: %w", last.what, err))...)
		}
		for _, a := range answers {
			if a.Header.Type != unix.NLMSG_ERROR || len(a.Data) < 4 {
				continue
			}
			errno := unix.Errno(-int32(nl.NativeEndian().Uint32(a.Data)))
			for _, c := range changes {
				if c.Seq == a.Header.Seq && errno != 0 && !(c.gone && (errno == unix.ENOENT || errno == unix.ENODEV)) {
					errs = append(errs, fmt.Errorf("%s: %w", c.what, errno))
				}
			}
			if a.Header.Seq == last.Seq {
				return errors.Join(errs...)
			}
		}
	}
}

// index is the number of a link.
func (r *rtnl) index(name string) (int, error) {
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		err = unix.IoctlIfreq(r.fd, unix.SIOCGIFINDEX, ifr)
	}
	if err != nil {
		return 0, fmt.Errorf("find link %s: %w", name, err)
	}
	return int(ifr.Uint32()), nil
}

// ifThere makes c content if what it is about isn't there.
func (c change) ifThere() change {
	c.gone = true
	return c
}

func newChange(what string, kind, flags int, data ...nl.NetlinkRequestData) change {
	c := change{NetlinkRequest: nl.NewNetlinkRequest(kind, flags), what: what}
	for _, d := range data {
		c.AddData(d)
	}
	return c
}

// linkNumber is the head of messages about a link; 0 is one that is named.
func linkNumber(index int) *nl.IfInfomsg {
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	return msg
}

func linkNamed(name string) *nl.RtAttr {
	return nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name))
}

func linkUp(name string, index int) change {
	msg := linkNumber(index)
	msg.Flags, msg.Change = unix.IFF_UP, unix.IFF_UP
	return newChange("set "+name+" up", unix.RTM_SETLINK, 0, msg)
}

// linkGroup moves a link into a group.
func linkGroup(name string, group uint32) change {
	return newChange(fmt.Sprintf("move link %s to group %d", name, group), unix.RTM_SETLINK, 0,
		linkNumber(0), linkNamed(name), nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(group)))
}

func linkDelete(name string) change {
	return newChange("remove link "+name, unix.RTM_DELLINK, 0, linkNumber(0), linkNamed(name))
}

// addressAdd gives a link an address that is ready at once: nobody else has it.
func addressAdd(index int, a netip.Prefix) change {
	ip := a.Addr().AsSlice()
	msg := nl.NewIfAddrmsg(family(a.Addr()))
	msg.Prefixlen, msg.Index = uint8(a.Bits()), uint32(index)
	data := []nl.NetlinkRequestData{msg, nl.NewRtAttr(unix.IFA_LOCAL, ip), nl.NewRtAttr(unix.IFA_ADDRESS, ip)}
	if a.Addr().Is4() {
		broadcast := net.IP(ip).Mask(net.CIDRMask(a.Bits(), 32))
		for i, m := range net.CIDRMask(a.Bits(), 32) {
			broadcast[i] |= ^m
		}
		data = append(data, nl.NewRtAttr(unix.IFA_BROADCAST, broadcast))
	} else {
		msg.Flags = unix.IFA_F_NODAD
	}
	return newChange(fmt.Sprintf("add address %s", a), unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, data...)
}

// neighborAdd tells who has an address, in an entry that no packet changes.
func neighborAdd(index int, a netip.Addr, mac net.HardwareAddr) change {
	return newChange(fmt.Sprintf("add neighbor %s", a), unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE,
		&netlink.Ndmsg{Family: uint8(family(a)), Index: uint32(index), State: netlink.NUD_PERMANENT},
		nl.NewRtAttr(netlink.NDA_DST, a.AsSlice()), nl.NewRtAttr(netlink.NDA_LLADDR, mac))
}

func neighborDelete(index int, a netip.Addr) change {
	return newChange(fmt.Sprintf("remove neighbor %s", a), unix.RTM_DELNEIGH, 0,
		&netlink.Ndmsg{Family: uint8(family(a)), Index: uint32(index)}, nl.NewRtAttr(netlink.NDA_DST, a.AsSlice()))
}

// defaultRoute sends by gateway what goes nowhere else.
func defaultRoute(index int, gateway netip.Addr) change {
	msg := nl.NewRtMsg()
	msg.Family = uint8(family(gateway))
	return newChange(fmt.Sprintf("add default route by %s", gateway), unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, msg,
		nl.NewRtAttr(unix.RTA_GATEWAY, gateway.AsSlice()), nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(uint32(index))))
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
