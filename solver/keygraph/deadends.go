package keygraph

import (
	"slices"

	"github.com/kilnbuild/kiln/solver"
)

// DeadEnds returns the keys that lead to no result any more, of start and of
// those that lead to start. A store that drops the results of start removes
// the links to these keys. (Counting links isn't enough: a step that changes
// nothing leads from a key to itself.)
func DeadEnds(start []solver.Key, hasResult func(solver.Key) bool, next, previous func(solver.Key) []solver.Key) (dead []solver.Key) {
	const alive, deadEnd = 1, 2
	known := map[solver.Key]int{}
	// What is known to be dead isn't gone through again: a chain that dies from
	// its end costs each of its keys once.
	onward := func(k solver.Key) (out []solver.Key) {
		for _, n := range next(k) {
			if known[n] != deadEnd {
				out = append(out, n)
			}
		}
		return out
	}
	work := slices.Clone(start)
	for len(work) > 0 {
		k := work[len(work)-1]
		work = work[:len(work)-1]
		if known[k] != 0 {
			continue
		}
		path, seen := wayToResult(k, func(k solver.Key) bool { return known[k] == alive || hasResult(k) }, onward)
		for _, k := range path {
			known[k] = alive
		}
		if path != nil {
			continue
		}
		for _, k := range seen {
			if known[k] == 0 {
				known[k] = deadEnd
				dead = append(dead, k)
				work = append(work, previous(k)...)
			}
		}
	}
	return dead
}

// wayToResult searches forward from start. It returns the way to a key that is
// good, or nil and every key that it has seen.
func wayToResult(start solver.Key, good func(solver.Key) bool, next func(solver.Key) []solver.Key) (path, seen []solver.Key) {
	type frame struct {
		key  solver.Key
		next []solver.Key
	}
	visited := map[solver.Key]bool{}
	var stack []frame
	enter := func(k solver.Key) bool {
		visited[k] = true
		seen = append(seen, k)
		if good(k) {
			for _, f := range stack {
				path = append(path, f.key)
			}
			path = append(path, k)
			return true
		}
		stack = append(stack, frame{key: k, next: next(k)})
		return false
	}
	if enter(start) {
		return path, seen
	}
	for len(stack) > 0 {
		f := &stack[len(stack)-1]
		if len(f.next) == 0 {
			stack = stack[:len(stack)-1]
			continue
		}
		k := f.next[0]
		f.next = f.next[1:]
		if !visited[k] && enter(k) {
			return path, seen
		}
	}
	return nil, seen
}
