// Package keygraph is what key stores have in common: how links and records
// answer a lookup, which keys lead nowhere, and a store in memory.
package keygraph

import (
	"slices"

	"github.com/kilnbuild/kiln/solver"
)

// Resolve answers a lookup from the links and records that a store gives: the
// keys that the candidates of every input lead to, and what hangs off them.
func Resolve(l solver.Lookup, targets func(input int, from solver.InputKey) []solver.Key, records func(solver.Key) []solver.Record) solver.Found {
	f := solver.Found{Keys: l.Roots, Matched: make([]bool, len(l.Inputs))}
	for i, candidates := range l.Inputs {
		var reached []solver.Key
		for _, from := range candidates {
			for _, k := range targets(i, from) {
				if !slices.Contains(reached, k) {
					reached = append(reached, k)
				}
			}
		}
		f.Matched[i] = len(reached) > 0
		if i == 0 {
			f.Keys = reached
		} else {
			f.Keys = slices.DeleteFunc(slices.Clone(f.Keys), func(k solver.Key) bool { return !slices.Contains(reached, k) })
		}
	}
	for _, k := range f.Keys {
		for _, r := range records(k) {
			if !slices.ContainsFunc(f.Records, func(o solver.Record) bool { return o.Result == r.Result }) {
				f.Records = append(f.Records, r)
			}
		}
	}
	slices.SortStableFunc(f.Records, func(a, b solver.Record) int { return b.CreatedAt.Compare(a.CreatedAt) })
	return f
}
