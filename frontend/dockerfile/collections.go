package dockerfile

import (
	"cmp"
	"maps"
	"slices"
)

func sorted[S ~[]E, E cmp.Ordered](s S) S {
	slices.Sort(s)
	return s
}

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K {
	return slices.Sorted(maps.Keys(m))
}

// join returns the keys of both sets.
func join(a, b map[string]struct{}) map[string]struct{} {
	out := make(map[string]struct{}, len(a)+len(b))
	maps.Copy(out, a)
	maps.Copy(out, b)
	return out
}
