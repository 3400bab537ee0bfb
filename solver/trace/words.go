package trace

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/kilnbuild/kiln/solver"
)

// line joins the words that aren't empty.
func line(words ...string) string {
	return strings.Join(slices.DeleteFunc(words, func(w string) bool { return w == "" }), " ")
}

// list is "name=a,b", or nothing if there are none.
func list[T any](name string, items []T, text func(T) string) string {
	if len(items) == 0 {
		return ""
	}
	words := make([]string, len(items))
	for i, item := range items {
		words[i] = text(item)
	}
	return name + "=" + strings.Join(words, ",")
}

// joined is keys in one item of a list.
func joined(keys []solver.Key) string {
	words := make([]string, len(keys))
	for i, k := range keys {
		words[i] = k.String()
	}
	return strings.Join(words, "+")
}

func mark(name string, set bool) string {
	if set {
		return name
	}
	return ""
}

func quoted(name, s string) string { return fmt.Sprintf("%s=%q", name, s) }

func vertex(v *solver.Vertex) string { return string(v.Digest) + mark("!", v.IgnoreCache) }

func edge(e solver.Edge) string {
	if e.Index == 0 {
		return vertex(e.Vertex)
	}
	return fmt.Sprintf("%s/%d", vertex(e.Vertex), e.Index)
}

// inputKey is the key, and the selector that qualifies it.
func inputKey(k solver.InputKey) string {
	return k.Key.String() + mark("@"+string(k.Selector), k.Selector != "")
}

func lookup(l solver.Lookup) string {
	words := []string{"op=" + string(l.Op), fmt.Sprintf("output=%d", l.Output), list("roots", l.Roots, solver.Key.String)}
	for i, keys := range l.Inputs {
		words = append(words, list(fmt.Sprintf("input%d", i), keys, inputKey))
	}
	return line(words...)
}

func found(f solver.Found) string {
	return line(list("keys", f.Keys, solver.Key.String), list("matched", f.Matched, func(m bool) string { return fmt.Sprint(m) }),
		list("records", f.Records, solver.Record.String))
}

func save(s solver.Save) string {
	return line(lookup(s.Lookup), list("keys", s.Keys, solver.Key.String))
}

func wanted(w solver.Wanted) string { return fmt.Sprintf("%d:%s", w.Save.Output, joined(w.Save.Keys)) }

func output(o solver.Output) string {
	return fmt.Sprintf("%d:%s:%s", o.Index, o.Result.ID(), joined(o.Keys))
}

func cacheMap(m *solver.CacheMap) string {
	if m == nil {
		return ""
	}
	return line("op="+string(m.Digest), list("deps", m.Deps, dep), mark("transient", m.Transient))
}

// dep is "+content" and "@selector", as they apply, or "-".
func dep(d solver.Dep) string {
	s := mark("+content", d.Content != nil) + mark("@"+string(d.Selector), d.Selector != "")
	if s == "" {
		return "-"
	}
	return s
}

func announced(a *solver.Announce) string {
	return line(vertex(a.Vertex), list("inputs", a.Inputs, edge), quoted("name", a.Vertex.Name))
}

// loadedAs is the result that an import gave, which the daemon has another name
// for.
func loadedAs(ev *solver.Loaded) string {
	if ev.Result == nil || ev.Result.ID() == ev.Record.Result {
		return ""
	}
	return "result=" + ev.Result.ID()
}

func outcome(err error) string {
	if err == nil {
		return ""
	}
	return quoted("error", err.Error())
}

// outcomeOrLoss is the outcome of what may have found inputs lost: those, and how.
func outcomeOrLoss(err error) string {
	lost := (*solver.LostError)(nil)
	if !errors.As(err, &lost) {
		return outcome(err)
	}
	return line(list("lost", lost.Inputs, func(i int) string { return fmt.Sprint(i) }), outcome(lost))
}
