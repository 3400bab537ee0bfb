package cache

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/containerd/v2/pkg/filters"
)

// Detail is a record with what keeps it and what will remove it.
type Detail struct {
	Usage
	// Users are the builds and records that use it, and what else keeps it from
	// going with its last user.
	Users []string
	// Rule is the first rule that may remove the record once it is unused for
	// long enough, "" if none may.
	Rule string
	// Due is set if that rule, applied now, would.
	Due bool
}

// namedUsers is how many records a Detail names among the users.
const namedUsers = 8

// Details describes the records that match any of filterBy, or all, as rules
// would treat them.
func (m *Manager) Details(ctx context.Context, filterBy []string, rules []PruneOptions) ([]Detail, error) {
	filter, err := filters.ParseAll(filterBy...)
	if err != nil {
		return nil, fmt.Errorf("parse filters %q: %w", filterBy, err)
	}
	entries := m.survey()
	if err := m.measure(ctx, entries); err != nil {
		return nil, err
	}
	subject, due, err := m.forecast(ctx, entries, rules)
	if err != nil {
		return nil, err
	}
	users := m.users(entries)
	var out []Detail
	for _, e := range entries {
		if !filter.Match((*fields)(&e.usage)) {
			continue
		}
		d := Detail{Usage: e.usage, Users: users[e], Rule: subject[e]}
		if rule, ok := due[e]; ok {
			d.Rule, d.Due = rule, true
		}
		out = append(out, d)
	}
	return out, nil
}

// forecast returns for each entry the first rule that it is subject to, and of
// those that would go now the rule that would remove them.
func (m *Manager) forecast(ctx context.Context, entries []*entry, rules []PruneOptions) (subject, due map[*entry]string, err error) {
	subject, due = map[*entry]string{}, map[*entry]string{}
	rest := entries
	for _, rule := range rules {
		filter, err := filters.ParseAll(rule.Filters...)
		if err != nil {
			return nil, nil, fmt.Errorf("parse filters of %s %q: %w", rule.Rule, rule.Filters, err)
		}
		for _, e := range entries {
			if _, ok := subject[e]; !ok && rule.covers(&e.usage) && filter.Match((*fields)(&e.usage)) {
				subject[e] = rule.Rule
			}
		}
		victims, err := m.plan(ctx, rest, rule, filter)
		if err != nil {
			return nil, nil, err
		}
		for _, e := range victims {
			due[e] = rule.Rule
		}
		rest = slices.DeleteFunc(slices.Clone(rest), func(e *entry) bool { return due[e] != "" })
	}
	return subject, due, nil
}

// users says who uses each of entries.
func (m *Manager) users(entries []*entry) map[*entry][]string {
	above := map[*entry][]string{} // who builds on one
	for _, e := range entries {
		for _, b := range e.below {
			above[b] = append(above[b], e.usage.ID)
		}
	}
	out := make(map[*entry][]string, len(entries))
	m.mu.Lock()
	for _, e := range entries {
		if e.r.handles > 0 {
			out[e] = append(out[e], "what runs now")
		}
	}
	m.mu.Unlock()
	for _, e := range entries {
		children := above[e]
		for i, id := range children {
			if i == namedUsers {
				out[e] = append(out[e], fmt.Sprintf("%d more records", len(children)-i))
				break
			}
			out[e] = append(out[e], "record "+id)
		}
	}
	for _, e := range entries {
		switch {
		case e.kept && e.usage.Mutable:
			out[e] = append(out[e], "kept for its next use")
		case e.kept:
			out[e] = append(out[e], "kept as a step's result")
		}
	}
	return out
}
