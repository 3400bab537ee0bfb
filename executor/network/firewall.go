//go:build linux

package network

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// mark is the comment of the owner's rules in tables of others.
func mark(o owner) []byte {
	return userdata.AppendString(nil, userdata.TypeComment, "kilnd "+o.String())
}

// openFirewall lets packets of the bridge pass where other programs, such as
// Docker, have set the policy to drop what is forwarded: an accept in a table of
// our own doesn't outweigh that. The rules come last, so that those which
// somebody has made on purpose count before; whether a packet may go to a step
// is still decided by our table. They match the names of links and no more,
// because iptables can't list a table in which there is anything it doesn't know.
func openFirewall(c *nftables.Conn, o owner, bridge string) error {
	if err := closeFirewall(c, o); err != nil {
		return err
	}
	chains, err := forwardChains(c)
	if err != nil {
		return err
	}
	for _, chain := range chains {
		if chain.Policy == nil || *chain.Policy != nftables.ChainPolicyDrop {
			continue
		}
		for _, key := range []expr.MetaKey{expr.MetaKeyIIFNAME, expr.MetaKeyOIFNAME} {
			exprs := append(link(key, expr.CmpOpEq, bridge), &expr.Counter{}, &expr.Verdict{Kind: expr.VerdictAccept})
			c.AddRule(&nftables.Rule{Table: chain.Table, Chain: chain, Exprs: exprs, UserData: mark(o)})
		}
		if err := c.Flush(); err != nil {
			return fmt.Errorf("let packets of %s pass in chain %s of table %s: %w", bridge, chain.Name, chain.Table.Name, err)
		}
	}
	return nil
}

// closeFirewall removes what openFirewall has added.
func closeFirewall(c *nftables.Conn, o owner) error {
	chains, err := forwardChains(c)
	if err != nil {
		return err
	}
	for _, chain := range chains {
		rules, err := c.GetRules(chain.Table, chain)
		if errors.Is(err, unix.ENOENT) {
			continue // removed meanwhile
		}
		if err != nil {
			return fmt.Errorf("list the rules in chain %s of table %s: %w", chain.Name, chain.Table.Name, err)
		}
		for _, r := range rules {
			if !bytes.Equal(r.UserData, mark(o)) {
				continue
			}
			err := c.DelRule(r)
			if err == nil {
				err = c.Flush()
			}
			if err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("remove a rule from chain %s of table %s: %w", chain.Name, chain.Table.Name, err)
			}
		}
	}
	return nil
}

// forwardChains are those of others that see forwarded packets.
func forwardChains(c *nftables.Conn) (out []*nftables.Chain, err error) {
	all, err := c.ListChains()
	if err != nil {
		return nil, fmt.Errorf("list the machine's firewall: %w", err)
	}
	for _, chain := range all {
		if chain.Hooknum == nil || *chain.Hooknum != *nftables.ChainHookForward {
			continue
		}
		switch chain.Table.Family {
		case nftables.TableFamilyINet, nftables.TableFamilyIPv4, nftables.TableFamilyIPv6:
			out = append(out, chain)
		}
	}
	return out, nil
}
