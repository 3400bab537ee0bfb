//go:build linux

package network

import (
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// table is the owner's alone.
func table(o owner) *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamilyINet, Name: "kiln_" + o.String()}
}

// addRules adds the rules for a bridge, in one transaction, in place of any that
// are there. As nft prints them:
//
//	table inet kiln_1f2e3d4c {
//		chain postrouting {
//			type nat hook postrouting priority srcnat; policy accept;
//			ip saddr 10.10.0.0/16 oifname != "buildkit0" masquerade
//		}
//		chain forward {
//			type filter hook forward priority filter; policy accept;
//			iifname "buildkit0" oifname "buildkit0" drop
//			iifname "buildkit0" ip saddr 10.10.0.0/16 accept
//			iifname "buildkit0" drop
//			oifname "buildkit0" ct state established,related accept
//			oifname "buildkit0" drop
//		}
//	}
//
// So nothing goes from step to step by way of the machine, no step sends with
// an address that isn't of the bridge, and nobody connects to a step from
// outside.
func addRules(o owner, bridge string, subnets []subnet) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	t := table(o)
	c.AddTable(t)
	c.DelTable(t)
	c.AddTable(t)
	nat := c.AddChain(&nftables.Chain{
		Table: t, Name: "postrouting", Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
	})
	fwd := c.AddChain(&nftables.Chain{
		Table: t, Name: "forward", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter,
	})
	add := func(chain *nftables.Chain, matches ...[]expr.Any) {
		var all []expr.Any
		for _, m := range matches {
			all = append(all, m...)
		}
		c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: all})
	}
	in, out := expr.MetaKeyIIFNAME, expr.MetaKeyOIFNAME
	for _, s := range subnets {
		add(nat, from(s), link(out, expr.CmpOpNeq, bridge), []expr.Any{&expr.Masq{}})
	}
	add(fwd, link(in, expr.CmpOpEq, bridge), link(out, expr.CmpOpEq, bridge), verdict(expr.VerdictDrop))
	for _, s := range subnets {
		add(fwd, link(in, expr.CmpOpEq, bridge), from(s), verdict(expr.VerdictAccept))
	}
	add(fwd, link(in, expr.CmpOpEq, bridge), verdict(expr.VerdictDrop))
	add(fwd, link(out, expr.CmpOpEq, bridge), established(), verdict(expr.VerdictAccept))
	add(fwd, link(out, expr.CmpOpEq, bridge), verdict(expr.VerdictDrop))
	if err := c.Flush(); err != nil {
		return fmt.Errorf("add the rules of table inet %s: %w", t.Name, lacking(err))
	}
	return openFirewall(c, o, bridge)
}

// lacking is err, or in place of what the kernel says of each rule what it lacks.
func lacking(err error) error {
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("this kernel has no nf_tables, or none with the family inet, chains for NAT, masquerading and connection tracking, or the modules for that aren't installed: %w", unix.EOPNOTSUPP)
	}
	return err
}

// removeRules is content if there are none.
func removeRules(o owner) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	c.DelTable(table(o))
	if err := c.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove table inet %s: %w", table(o).Name, err)
	}
	return closeFirewall(c, o)
}

const register = 1

// link matches packets by where they came in or go out.
func link(key expr.MetaKey, op expr.CmpOp, name string) []expr.Any {
	padded := make([]byte, unix.IFNAMSIZ)
	copy(padded, name)
	return []expr.Any{&expr.Meta{Key: key, Register: register}, &expr.Cmp{Op: op, Register: register, Data: padded}}
}

// from matches packets with a source in s.
func from(s subnet) []expr.Any {
	family, offset := byte(unix.NFPROTO_IPV4), uint32(12)
	if !s.Addr().Is4() {
		family, offset = unix.NFPROTO_IPV6, 8
	}
	prefix := s.ipNet(s.Addr())
	size := uint32(len(prefix.IP))
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: register},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: []byte{family}},
		&expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size},
		&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: size, Mask: prefix.Mask, Xor: make([]byte, size)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: register, Data: prefix.IP},
	}
}

// established matches packets of known connections.
func established() []expr.Any {
	states := binaryutil.NativeEndian.PutUint32(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED)
	zero := make([]byte, 4)
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: register},
		&expr.Bitwise{SourceRegister: register, DestRegister: register, Len: 4, Mask: states, Xor: zero},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: register, Data: zero},
	}
}

func verdict(kind expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: kind}} }
