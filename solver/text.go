package solver

import (
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// The text format of a build: a line for every event and effect, made of words.
// What Trace records can be replayed by the tests, which also read and write
// testdata/*.txt in it. A vertex is its digest, with a "!" if it ignores the
// cache; an edge other than the first output is vertex/output; keys are hex;
// what people wrote (names, reasons, errors) is quoted, and last.

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
func joined(keys []Key) string {
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

func (v *Vertex) id() string {
	if v.IgnoreCache {
		return string(v.Digest) + "!"
	}
	return string(v.Digest)
}

// String is the edge in the text format.
func (e Edge) String() string {
	if e.Index == 0 {
		return e.Vertex.id()
	}
	return fmt.Sprintf("%s/%d", e.Vertex.id(), e.Index)
}

// String is the key in hex.
func (k Key) String() string { return hex.EncodeToString(k[:]) }

// String is the key, and the selector that qualifies it.
func (k InputKey) String() string {
	if k.Selector == "" {
		return k.Key.String()
	}
	return k.Key.String() + "@" + string(k.Selector)
}

// String is the lookup in the text format.
func (l Lookup) String() string {
	words := []string{"op=" + string(l.Op), fmt.Sprintf("output=%d", l.Output), list("roots", l.Roots, Key.String)}
	for i, keys := range l.Inputs {
		words = append(words, list(fmt.Sprintf("input%d", i), keys, InputKey.String))
	}
	return line(words...)
}

func (s Save) String() string { return line(s.Lookup.String(), list("keys", s.Keys, Key.String)) }

func outcome(err error) string {
	if err == nil {
		return ""
	}
	return quoted("error", err.Error())
}

func lostInputs(err error) string {
	if lost := (*LostError)(nil); errors.As(err, &lost) {
		return list("lost", lost.Inputs, func(i int) string { return fmt.Sprint(i) })
	}
	return ""
}

// The events.

func (ev *Requested) String() string {
	return fmt.Sprintf("request %d %s", ev.Call, ev.Edge)
}

func (ev *Abandoned) String() string { return fmt.Sprintf("abandon %d", ev.Call) }

func (ev *FoundLost) String() string {
	return line("found lost", ev.Edge.String(), ev.Record, outcome(ev.Err))
}

func (ev *GotCacheMap) String() string {
	if ev.Err != nil || ev.Map == nil {
		return line("cachemap", ev.Vertex.id(), outcome(ev.Err))
	}
	return line("cachemap", ev.Vertex.id(), "op="+string(ev.Map.Digest), list("deps", ev.Map.Deps, Dep.text), mark("transient", ev.Map.Transient), mark("more", ev.More))
}

// text is "+content" and "@selector", as they apply, or "-".
func (d Dep) text() (s string) {
	if d.Content != nil {
		s += "+content"
	}
	if d.Selector != "" {
		s += "@" + string(d.Selector)
	}
	if s == "" {
		return "-"
	}
	return s
}

func (ev *Queried) String() string {
	return line("lookup", ev.Edge.String(), list("keys", ev.Found.Keys, Key.String),
		list("matched", ev.Found.Matched, func(m bool) string { return fmt.Sprint(m) }),
		list("records", ev.Found.Records, Record.id))
}

func (ev *Loaded) String() string {
	return line("load", ev.Edge.String(), ev.Record.id(), mark("gone", errors.Is(ev.Err, ErrNoResult)), outcome(ev.Err))
}

func (ev *Digested) String() string {
	return line("digest", ev.Vertex.id(), fmt.Sprint(ev.Input), mark("content="+string(ev.Content), ev.Err == nil), lostInputs(ev.Err), outcome(ev.Err))
}

func (ev *Executed) String() string {
	return line("execute", ev.Vertex.id(),
		list("outputs", ev.Outputs, func(out Output) string {
			return fmt.Sprintf("%d:%s:%s", out.Index, out.Result.ID(), joined(out.Keys))
		}),
		mark("cached", ev.Cached), mark("unwanted", errors.Is(ev.Err, errUnwanted)), lostInputs(ev.Err), outcome(ev.Err))
}

// The effects.

func (e *Announce) String() string {
	return line("announce", e.Vertex.id(), list("inputs", e.Inputs, Edge.String), quoted("name", e.Vertex.Name))
}

func (e *GetCacheMap) String() string {
	return fmt.Sprintf("get cachemap %d of %s", e.Index, e.Vertex.id())
}

func (e *Query) String() string { return fmt.Sprintf("start lookup %s %s", e.Edge, e.Lookup) }

func (e *Load) String() string {
	return fmt.Sprintf("start load %s %s %q", e.Edge, e.Record.id(), e.Reason)
}

func (e *Digest) String() string {
	return fmt.Sprintf("start digest %s %d of %s", e.Vertex.id(), e.Input, e.Result.ID())
}

func (e *Execute) String() string {
	return line("start execute", e.Vertex.id(), list("inputs", e.Inputs, Result.ID),
		list("saves", e.Wanted, func(w Wanted) string {
			return fmt.Sprintf("%d:%s", w.Save.Output, joined(w.Save.Keys))
		}), fmt.Sprintf("%q", e.Reason))
}

func (e *Cancel) String() string { return "cancel " + e.Vertex.id() }

func (e *Cached) String() string { return "cached " + e.Vertex.id() }

func (e *Link) String() string { return "link " + e.Save.String() }

func (e *Adopt) String() string {
	result := e.Record.id()
	if e.Save.Result != nil {
		result = e.Save.Result.ID()
	}
	return line("adopt", e.Save.String(), mark("result="+result, result != ""))
}

func (e *Drop) String() string {
	return fmt.Sprintf("drop %s %q", strings.Join(e.Records, ","), e.Reason)
}

func (e *Release) String() string { return "release " + e.Result.ID() }

func (e *Answer) String() string {
	if e.Err != nil {
		return line("answer", fmt.Sprint(e.Call), outcome(e.Err))
	}
	return fmt.Sprintf("answer %d %s", e.Call, e.Result.ID())
}
