package explain

import (
	"slices"
	"strings"

	"github.com/kilnbuild/kiln/internal/explanation"
)

// difference is what two records of a step don't agree in.
type difference struct {
	op     bool     // the definition
	facets []string // the parts of it that differ, by name
	inputs []int
}

func (d difference) none() bool { return !d.op && len(d.inputs) == 0 }

// size is for finding the nearest record.
func (d difference) size() int { return max(len(d.facets), boolInt(d.op)) + len(d.inputs) }

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// compare tells now from old.
func compare(now, old *record) (d difference) {
	if d.op = now.Op != old.Op; d.op {
		d.facets = withoutOrders(now.Facets.differ(old.Facets))
	}
	if len(now.Inputs) != len(old.Inputs) {
		d.op = true
		return d
	}
	for i := range now.Inputs {
		if !now.Inputs[i].same(old.Inputs[i]) {
			d.inputs = append(d.inputs, i)
		}
	}
	return d
}

// differ names what f and old don't agree in, in order.
func (f facets) differ(old facets) []string {
	names := f.different(old)
	if slices.ContainsFunc(names, func(name string) bool { return strings.HasSuffix(name, foldMark) }) {
		a, b := comparable(f, old)
		return a.different(b)
	}
	return names
}

// different is differ where the same is folded in both.
func (f facets) different(old facets) (names []string) {
	for a, b := f, old; len(a)+len(b) > 0; {
		if len(a) > 0 && len(b) > 0 && (a[0] == b[0] || *a[0] == *b[0]) {
			a, b = a[1:], b[1:]
			continue
		}
		name := first(a, b)
		names = append(names, name)
		a, b = a.without(name), b.without(name)
	}
	return names
}

// first is the first name in a and b, one of which has one.
func first(a, b facets) string {
	switch {
	case len(a) == 0:
		return b[0].name
	case len(b) == 0:
		return a[0].name
	}
	return min(a[0].name, b[0].name)
}

// without leaves out the first facet if it has that name.
func (f facets) without(name string) facets {
	if len(f) > 0 && f[0].name == name {
		return f[1:]
	}
	return f
}

// comparable folds in each what is folded in the other.
func comparable(a, b facets) (facets, facets) {
	if !a.folded() && !b.folded() {
		return a, b
	}
	x, y := a.values(), b.values()
	for _, group := range groups {
		if name := folded(group); a.of(name) != "" || b.of(name) != "" {
			x, y = x.fold(group), y.fold(group)
		}
	}
	return x.facets(nil), y.facets(nil)
}

func union(a, b map[string]string) map[string]bool {
	out := make(map[string]bool, len(a))
	for name := range a {
		out[name] = true
	}
	for name := range b {
		out[name] = true
	}
	return out
}

// withoutOrders leaves out that things are in another order when the things
// themselves differ.
func withoutOrders(facets []string) []string {
	if len(facets) < 2 {
		return facets
	}
	isOrder := func(name string) bool { return strings.HasPrefix(name, "order of ") }
	if rest := slices.DeleteFunc(slices.Clone(facets), isOrder); len(rest) > 0 {
		return rest
	}
	return facets
}

// facetCauses names the differing parts of a definition, the command first.
func (d difference) facetCauses(now, old *record, isArgument func(string) bool) (out []explanation.Cause) {
	a, b := comparable(now.Facets, old.Facets)
	for _, name := range d.facets {
		c := facetCause(name, b.of(name), a.of(name), isArgument)
		switch {
		case c.Kind == explanation.Command && old.Step.Text != now.Step.Text:
			c.From = old.Step.Text
		case name == "order of the actions" && old.Step.Text != now.Step.Text:
			// Whoever wrote the instruction has ordered nothing: with --link, say, it
			// makes files on nothing.
			c = explanation.Cause{Kind: explanation.Command, From: old.Step.Text, Certain: true}
		case c.Kind == explanation.Definition && strings.HasSuffix(name, "content"):
			c.Subject = now.Step.written(a.of(strings.TrimSuffix(name, "content") + "destination"))
		case c.Kind == explanation.Image && c.Subject == "digest":
			c.Subject = a.of("image")
			if slices.Contains(d.facets, "image") {
				continue // another image has another digest
			}
		}
		if c.Kind == explanation.Command {
			out = slices.Insert(out, 0, c)
		} else {
			out = append(out, c)
		}
	}
	if d.op && len(out) == 0 {
		out = append(out, explanation.Cause{Kind: explanation.Definition, Certain: true})
	}
	return out
}

func facetCause(name, from, to string, isArgument func(string) bool) explanation.Cause {
	c := explanation.Cause{Subject: name, From: value(from), To: value(to), Certain: true}
	variable, isEnv := strings.CutPrefix(name, "env ")
	switch {
	case name == folded("env"):
		c.Kind, c.Subject = explanation.Definition, "environment"
	case name == folded(""):
		c.Kind, c.Subject, c.From, c.To = explanation.Definition, "", "", ""
	case strings.HasSuffix(name, foldMark):
		c.Kind, c.Subject = explanation.Definition, strings.TrimSuffix(name, foldMark)+"s"
	case isEnv && isArgument(variable):
		c.Kind, c.Subject = explanation.Argument, variable
	case isEnv:
		c.Kind, c.Subject = explanation.Env, variable
	case name == "command":
		c = explanation.Cause{Kind: explanation.Command, Certain: true}
	case name == "image":
		c.Kind, c.Subject = explanation.Image, ""
	case name == "digest":
		c.Kind = explanation.Image
	default:
		c.Kind = explanation.Definition
	}
	return c
}

// value is a facet's as people may see it.
func value(v string) string {
	if strings.HasPrefix(v, "#") {
		return explanation.Hidden
	}
	return v
}
