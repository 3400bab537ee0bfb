package cache

import (
	"context"
	"slices"
)

// Merge returns the record in which parents are stacked in order. nil parents
// count as empty; without any other the result is nil. Nothing is copied, and
// lazy parents stay lazy until the result is extracted.
//
// A layer that several parents have is stacked for each, so that what one of them
// has on top of another, Diff finds.
func (m *Manager) Merge(ctx context.Context, parents []*Ref, opts Options) (*Ref, error) {
	var below []*record
	var layers []*record
	for _, p := range parents {
		if p != nil && !slices.Contains(below, p.r) {
			below = append(below, p.r)
		}
	}
	for _, p := range parents {
		if p != nil {
			layers = append(layers, p.r.stack()...)
		}
	}
	if len(layers) > maxStack {
		layers = lastOfEach(layers)
	}
	return m.stackOf(below, layers, opts), nil
}

// Diff returns the record of what upper adds to lower, if upper's layers start
// with all of lower's; a nil lower is empty. Otherwise ok is false, and the
// caller has to compare files.
func (m *Manager) Diff(ctx context.Context, lower, upper *Ref, opts Options) (ref *Ref, ok bool) {
	if upper == nil {
		return nil, lower == nil
	}
	layers := upper.r.stack()
	if lower != nil {
		under := lower.r.stack()
		if len(under) > len(layers) || !slices.Equal(under, layers[:len(under)]) {
			return nil, false
		}
		layers = layers[len(under):]
	}
	return m.stackOf([]*record{upper.r}, layers, opts), true
}

// maxStack is how many layers a merge may have before those that are repeated go.
// Merges of merges could double them without end.
const maxStack = 1000

// lastOfEach drops all but the last occurrence of each record: what it changes
// wins there in any case, and what records in between take away of it is back.
func lastOfEach(records []*record) []*record {
	seen := map[*record]bool{}
	var out []*record
	for _, r := range slices.Backward(records) {
		if !seen[r] {
			seen[r] = true
			out = append(out, r)
		}
	}
	slices.Reverse(out)
	return out
}

// stackOf returns the record made of layers, which are ancestors of parents or
// among them: one of the parents if that is all that it is.
func (m *Manager) stackOf(parents, layers []*record, opts Options) *Ref {
	if len(layers) == 0 {
		return nil
	}
	for _, p := range parents {
		if slices.Equal(p.stack(), layers) {
			m.mu.Lock()
			defer m.mu.Unlock()
			p.handles++
			return m.newRef(p)
		}
	}
	r := newRecord(immutable, parents, opts)
	r.layers = layers
	m.mu.Lock()
	for _, p := range parents {
		m.refreshChainLocked(p)
	}
	m.addLocked(r)
	m.mu.Unlock()
	m.flush(flushChanged)
	return m.newRef(r)
}
