package trace

import (
	"context"
	"errors"
	"regexp"
	"strconv"
	"strings"

	"github.com/kilnbuild/kiln/solver"
	"github.com/opencontainers/go-digest"
)

// words are a line, split: its fields in order, and those of the form key=value.
type words struct {
	fields []string
	values map[string]string
	flags  map[string]bool
}

// whatPeopleWrote begins with the first of these, and ends with the line.
var whatPeopleWrote = regexp.MustCompile(` (error|name)=`)

func (p *player) split(line string) words {
	w := words{values: map[string]string{}, flags: map[string]bool{}}
	if at := whatPeopleWrote.FindStringSubmatchIndex(line); at != nil {
		text, err := strconv.Unquote(line[at[1]:])
		if err != nil {
			p.fail("what follows %s must be quoted, and last", line[at[0]+1:at[1]])
		}
		w.values[line[at[2]:at[3]]], line = text, line[:at[0]]
	}
	for _, f := range strings.Fields(line) {
		if k, v, ok := strings.Cut(f, "="); ok {
			w.values[k] = v
		} else {
			w.fields = append(w.fields, f)
			w.flags[f] = true
		}
	}
	return w
}

// field is the i-th.
func (p *player) field(w words, i int) string {
	if i >= len(w.fields) {
		p.fail("a word is missing")
		return ""
	}
	return w.fields[i]
}

func (p *player) number(s string) int {
	n, err := strconv.Atoi(s)
	if err != nil {
		p.fail("%q is no number", s)
	}
	return n
}

func items(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(s, ",")
}

// define adds a vertex.
func (p *player) define(line string) {
	w := p.split(line)
	id := p.field(w, 1)
	v := &solver.Vertex{Digest: digest.Digest(strings.TrimSuffix(id, "!")), Name: id, IgnoreCache: strings.HasSuffix(id, "!")}
	if name, ok := w.values["name"]; ok {
		v.Name = name
	}
	for _, in := range items(w.values["inputs"]) {
		v.Inputs = append(v.Inputs, p.edge(in))
	}
	p.vertices[id] = v
}

func (p *player) edge(s string) solver.Edge {
	id, index, ok := strings.Cut(s, "/")
	e := solver.Edge{Vertex: p.vertices[id]}
	if e.Vertex == nil {
		p.fail("there is no vertex %q", id)
	}
	if ok {
		e.Index = p.number(index)
	}
	return e
}

func (p *player) keyList(words []string) (out []solver.Key) {
	for _, s := range words {
		out = append(out, p.key(s))
	}
	return out
}

// record is an id, or "importN:id".
func (p *player) record(s string) solver.Record {
	rest, imported := strings.CutPrefix(s, "import")
	n, id, ok := strings.Cut(rest, ":")
	if !imported || !ok {
		return solver.Record{Result: s}
	}
	return solver.Record{Result: id, Import: p.number(n)}
}

// error is how the outcome failed; nil if it did not.
func (p *player) error(w words) error {
	text, failed := w.values["error"]
	lost, isLost := w.values["lost"]
	switch {
	case !failed:
		return nil
	case w.flags["gone"]:
		return gone(text)
	case w.flags["unwanted"]:
		return solver.ErrUnwanted
	case isLost:
		out := &solver.LostError{Err: errors.New(strings.TrimPrefix(text, "input lost: "))}
		for _, s := range items(lost) {
			out.Inputs = append(out.Inputs, p.number(s))
		}
		return out
	}
	return errors.New(text)
}

// gone is an error whose text is known.
type gone string

func (e gone) Error() string        { return string(e) }
func (e gone) Is(target error) bool { return target == solver.ErrNoResult }

// event parses a line. It returns nil if it can't.
func (p *player) event(line string) solver.Event {
	w := p.split(line)
	switch p.field(w, 0) {
	case "request":
		return &solver.Requested{Call: p.number(p.field(w, 1)), Edge: p.edge(p.field(w, 2))}
	case "abandon":
		return &solver.Abandoned{Call: p.number(p.field(w, 1))}
	case "found": // lost
		return &solver.FoundLost{Edge: p.edge(p.field(w, 2)), Record: p.field(w, 3), Err: p.error(w)}
	case "cachemap":
		return p.gotCacheMap(w)
	case "lookup":
		return p.queried(w)
	case "load":
		return p.loaded(w)
	case "digest":
		if eff, ok := cause[*solver.Digest](p, w, 3); ok {
			content := digest.Digest(w.values["content"])
			p.call(solver.ContentKey(content), "content("+string(content)+")")
			return &solver.Digested{Digest: eff, Content: content, Err: p.error(w)}
		}
	case "execute":
		return p.executed(w)
	default:
		p.fail("%q is no event", w.fields[0])
	}
	return nil
}

func (p *player) gotCacheMap(w words) solver.Event {
	eff, ok := cause[*solver.GetCacheMap](p, w, 2)
	if !ok {
		return nil
	}
	ev := &solver.GotCacheMap{GetCacheMap: eff, More: w.flags["more"], Err: p.error(w)}
	if op, ok := w.values["op"]; ok {
		ev.Map = &solver.CacheMap{Digest: digest.Digest(op), Deps: deps(items(w.values["deps"])), Transient: w.flags["transient"]}
		p.callOp(ev.Map.Digest)
	}
	return ev
}

// deps are as words.go writes them.
func deps(words []string) (out []solver.Dep) {
	for _, s := range words {
		var d solver.Dep
		content, selector, _ := strings.Cut(s, "@")
		d.Selector = digest.Digest(selector)
		if content == "+content" {
			d.Content = func(context.Context, solver.Asker, solver.Result) (digest.Digest, error) {
				return "", errors.New("internal error: a content function is called that is only text")
			}
		}
		out = append(out, d)
	}
	return out
}

func (p *player) queried(w words) solver.Event {
	eff, ok := cause[*solver.Query](p, w, 2)
	if !ok {
		return nil
	}
	ev := &solver.Queried{Query: eff}
	ev.Found.Keys = p.keyList(items(w.values["keys"]))
	ev.Found.Matched = make([]bool, len(ev.Lookup.Inputs))
	for i, s := range items(w.values["matched"]) {
		if i < len(ev.Found.Matched) {
			ev.Found.Matched[i] = s == "true"
		}
	}
	for _, r := range items(w.values["records"]) {
		ev.Found.Records = append(ev.Found.Records, p.record(r))
	}
	return ev
}

func (p *player) loaded(w words) solver.Event {
	eff, ok := cause[*solver.Load](p, w, 3)
	if !ok {
		return nil
	}
	ev := &solver.Loaded{Load: eff, Err: p.error(w)}
	if ev.Err == nil {
		id := ev.Record.Result
		if other, ok := w.values["result"]; ok {
			id = other
		}
		ev.Result = p.result(id)
	}
	return ev
}

// executed is "execute V outputs=0:r1", with the keys that the core has chosen,
// or "0:r1:key+key".
func (p *player) executed(w words) solver.Event {
	eff, ok := cause[*solver.Execute](p, w, 2)
	if !ok {
		return nil
	}
	ev := &solver.Executed{Execute: eff, Cached: w.flags["cached"], Err: p.error(w)}
	if ev.Err != nil {
		return ev
	}
	for _, s := range items(w.values["outputs"]) {
		parts := strings.Split(s, ":")
		if len(parts) < 2 {
			p.fail("output %q isn't of the form index:result", s)
			return nil
		}
		out := solver.Output{Index: p.number(parts[0]), Result: p.result(parts[1])}
		if len(parts) == 3 && parts[2] != "" {
			out.Keys = p.keyList(strings.Split(parts[2], "+"))
		} else if len(parts) == 2 && !ev.Transient {
			out.Keys = ev.Save(out.Index).Keys
		}
		ev.Outputs = append(ev.Outputs, out)
	}
	return ev
}
