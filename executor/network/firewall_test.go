//go:build linux

package network

import (
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// On a machine with Docker, whose firewall drops what it has no rule for, steps
// reach the world all the same.
func TestFirewallThatDrops(t *testing.T) {
	world := outside(t)
	serve(t, world, "192.0.2.2:80", "world")
	serve(t, world, "[2001:db8::2]:80", "world")
	c, err := nftables.New()
	must(t, err)
	drop := nftables.ChainPolicyDrop
	var chains []*nftables.Chain
	for _, family := range []nftables.TableFamily{nftables.TableFamilyIPv4, nftables.TableFamilyIPv6} {
		table := c.AddTable(&nftables.Table{Family: family, Name: "filter"})
		t.Cleanup(func() { c.DelTable(table); must(t, c.Flush()) })
		chain := c.AddChain(&nftables.Chain{
			Table: table, Name: "FORWARD", Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &drop,
		})
		theirs := append(link(expr.MetaKeyIIFNAME, expr.CmpOpEq, "docker0"), verdict(expr.VerdictAccept)...)
		c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: theirs})
		chains = append(chains, chain)
	}
	must(t, c.Flush())
	rules := func() (n int) {
		t.Helper()
		for _, chain := range chains {
			list, err := c.GetRules(chain.Table, chain)
			must(t, err)
			n += len(list)
		}
		return n
	}
	dir := t.TempDir()
	cfg := Config{Mode: Bridge, BridgeSubnet: "10.18.0.0/16,fd00:18::/64"}
	crash(t, dir, Config{Mode: Bridge})
	if n := rules(); n != 6 {
		t.Fatalf("%d rules, 2 of others and 4 for the bridge", n)
	}
	for range 2 {
		n, err := Open(dir, cfg, discard)
		must(t, err)
		if n := rules(); n != 6 {
			t.Errorf("%d rules, 2 of others and 4 for the bridge", n)
		}
		ns := take(t, n.Default)
		answers(t, ns, "192.0.2.2:80", "world to 192.0.2.1")
		answers(t, ns, "[2001:db8::2]:80", "world to 2001:db8::1")
		ns.Release()
		must(t, n.Close())
		if n := rules(); n != 2 {
			t.Errorf("%d rules are left of 2 that are of others", n)
		}
	}
}
