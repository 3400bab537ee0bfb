package solver_test

import (
	"context"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	. "github.com/kilnbuild/kiln/solver"
	"github.com/kilnbuild/kiln/solver/keygraph"
	"github.com/kilnbuild/kiln/solver/trace"
	"github.com/opencontainers/go-digest"
)

var update = flag.Bool("update", false, "rewrite the effects in testdata")

// player feeds a core with lines of the text format.
type player struct {
	t        *testing.T
	w        *world
	core     *Core
	vertices map[string]*Vertex
	started  map[string]Effect // that have an outcome, by what it begins with

	names map[Key]string // what scenarios call keys
	keys  map[string]Key
}

func newPlayer(t *testing.T) *player {
	return &player{
		t: t, w: newWorld(), core: NewCore(), vertices: map[string]*Vertex{}, started: map[string]Effect{},
		names: map[Key]string{}, keys: map[string]Key{},
	}
}

// words are a line, split: its fields in order, and those of the form key=value.
type words struct {
	fields []string
	values map[string]string
	flags  map[string]bool
}

func split(line string) words {
	w := words{values: map[string]string{}, flags: map[string]bool{}}
	if head, quoted, ok := strings.Cut(line, `error="`); ok {
		text, err := strconv.Unquote(`"` + quoted)
		if err != nil {
			panic(fmt.Sprintf("line %q: %v", line, err))
		}
		w.values["error"], line = text, head
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

func items(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(s, ",")
}

// define adds "vertex NAME inputs=A,B/1", or what an announce effect says.
func (p *player) define(line string) {
	w := split(line)
	id := w.fields[1]
	v := &Vertex{Digest: digest.Digest(strings.TrimSuffix(id, "!")), Name: id, IgnoreCache: strings.HasSuffix(id, "!")}
	if _, name, ok := strings.Cut(line, " name="); ok {
		v.Name, _ = strconv.Unquote(name)
	}
	for _, in := range items(w.values["inputs"]) {
		v.Inputs = append(v.Inputs, p.edge(in))
	}
	p.vertices[id] = v
}

func (p *player) vertex(id string) *Vertex {
	v := p.vertices[id]
	if v == nil {
		p.t.Fatalf("there is no vertex %s", id)
	}
	return v
}

func (p *player) edge(s string) Edge {
	id, index, _ := strings.Cut(s, "/")
	n, _ := strconv.Atoi(index)
	return Edge{p.vertex(id), n}
}

func (p *player) result(id string) Result {
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	return p.w.handleLocked(id)
}

// key is hex, or what a scenario calls a key.
func (p *player) key(s string) Key {
	if b, err := hex.DecodeString(s); err == nil && len(b) == len(Key{}) {
		return Key(b)
	}
	if k, ok := p.keys[s]; ok {
		return k
	}
	k := RootKey(digest.Digest("key "+s), 0)
	p.call(k, s)
	return k
}

func (p *player) call(k Key, name string) {
	if p.names[k] == "" {
		p.names[k], p.keys[name] = name, k
	}
}

func (p *player) keyList(words []string) (out []Key) {
	for _, s := range words {
		out = append(out, p.key(s))
	}
	return out
}

func (w words) err() error {
	text, failed := w.values["error"]
	lost, isLost := w.values["lost"]
	switch {
	case !failed:
		return nil
	case w.flags["gone"]:
		return gone(text)
	case w.flags["unwanted"]:
		return ErrUnwanted
	case isLost:
		out := &LostError{Err: errors.New(strings.TrimPrefix(text, "input lost: "))}
		for _, s := range items(lost) {
			n, _ := strconv.Atoi(s)
			out.Inputs = append(out.Inputs, n)
		}
		return out
	}
	return errors.New(text)
}

// gone is an error whose text is known.
type gone string

func (e gone) Error() string        { return string(e) }
func (e gone) Is(target error) bool { return target == ErrNoResult }

// outcome is how the line of the outcome of eff begins; "" if there is none.
func outcomeOf(eff Effect) string {
	words := strings.Fields(trace.Effect(eff))
	switch eff.(type) {
	case *GetCacheMap:
		return "cachemap " + words[len(words)-1]
	case *Query, *Load, *Execute:
		return words[1] + " " + words[2]
	case *Digest:
		return strings.Join(words[1:4], " ")
	}
	return ""
}

// cause is the effect whose outcome w is.
func cause[E Effect](p *player, w words) E {
	name := strings.Join(w.fields[:2], " ")
	if w.fields[0] == "digest" {
		name += " " + w.fields[2]
	}
	eff, ok := p.started[name].(E)
	if !ok {
		p.t.Fatalf("%q was not started", name)
	}
	return eff
}

// event parses a line.
func (p *player) event(line string) Event {
	w := split(line)
	number := func(i int) int {
		n, err := strconv.Atoi(w.fields[i])
		if err != nil {
			p.t.Fatalf("line %q: %v", line, err)
		}
		return n
	}
	switch w.fields[0] {
	case "request":
		return &Requested{Call: number(1), Edge: p.edge(w.fields[2])}
	case "abandon":
		return &Abandoned{Call: number(1)}
	case "found":
		return &FoundLost{Edge: p.edge(w.fields[2]), Record: w.fields[3], Err: w.err()}
	case "cachemap":
		ev := &GotCacheMap{GetCacheMap: cause[*GetCacheMap](p, w), More: w.flags["more"], Err: w.err()}
		if op, ok := w.values["op"]; ok {
			ev.Map = &CacheMap{Digest: digest.Digest(op), Deps: deps(items(w.values["deps"])), Transient: w.flags["transient"]}
			p.callRoots(ev.Map.Digest)
		}
		return ev
	case "lookup":
		ev := &Queried{Query: cause[*Query](p, w)}
		ev.Found.Keys = p.keyList(items(w.values["keys"]))
		ev.Found.Matched = make([]bool, len(ev.Edge.Vertex.Inputs))
		for i, s := range items(w.values["matched"]) {
			ev.Found.Matched[i] = s == "true"
		}
		for _, r := range items(w.values["records"]) {
			ev.Found.Records = append(ev.Found.Records, record(r))
		}
		return ev
	case "load":
		ev := &Loaded{Load: cause[*Load](p, w), Err: w.err()}
		if ev.Err == nil {
			ev.Result = p.result(w.fields[2])
		}
		return ev
	case "digest":
		content := digest.Digest(w.values["content"])
		p.call(ContentKey(content), "content("+string(content)+")")
		return &Digested{Digest: cause[*Digest](p, w), Content: content, Err: w.err()}
	case "execute":
		return p.executed(w)
	}
	p.t.Fatalf("line %q is no event", line)
	return nil
}

func (p *player) callRoots(op digest.Digest) {
	p.call(RootKey(op, 0), fmt.Sprintf("root(%s)", op))
	p.call(RootKey(op, 1), fmt.Sprintf("root(%s/1)", op))
}

func deps(words []string) (out []Dep) {
	for _, s := range words {
		var d Dep
		content, selector, _ := strings.Cut(s, "@")
		d.Selector = digest.Digest(selector)
		if content == "+content" {
			d.Content = func(context.Context, Asker, Result) (digest.Digest, error) { return "", nil }
		}
		out = append(out, d)
	}
	return out
}

// record is an id, or "importN:id".
func record(s string) Record {
	n, id, ok := strings.Cut(strings.TrimPrefix(s, "import"), ":")
	if !ok {
		return Record{Result: s}
	}
	number, _ := strconv.Atoi(n)
	return Record{Result: id, Import: number}
}

// executed is "execute V outputs=0:r1", with the keys that the core has chosen,
// or "0:r1:key+key".
func (p *player) executed(w words) *Executed {
	ev := &Executed{Execute: cause[*Execute](p, w), Cached: w.flags["cached"], Err: w.err()}
	if ev.Err != nil {
		return ev
	}
	for _, s := range items(w.values["outputs"]) {
		parts := strings.Split(s, ":")
		i, _ := strconv.Atoi(parts[0])
		out := Output{Index: i, Result: p.result(parts[1])}
		if len(parts) == 3 {
			out.Keys = p.keyList(strings.Split(parts[2], "+"))
		} else if !ev.Transient {
			out.Keys = ev.SaveOf(i).Keys
		}
		ev.Outputs = append(ev.Outputs, out)
	}
	return ev
}

// step feeds one line and returns the lines of its effects. What an effect owns
// is given back.
func (p *player) step(line string) (out []string) {
	for _, eff := range p.core.Step(p.event(line)) {
		out = append(out, trace.Effect(eff))
		if name := outcomeOf(eff); name != "" {
			p.started[name] = eff
		}
		switch eff := eff.(type) {
		case *Release:
			eff.Result.Release()
		case *Digest:
			eff.Result.Release()
		case *Answer:
			releaseIfAny(eff.Result)
		case *Adopt:
			releaseIfAny(eff.Save.Result)
		case *Execute:
			for _, r := range eff.Inputs {
				r.Release()
			}
		}
	}
	return out
}

func releaseIfAny(r Result) {
	if r != nil {
		r.Release()
	}
}

// end checks that the core accounts for every result.
func (p *player) end() {
	for _, r := range p.core.Results() {
		r.Release()
	}
	p.w.check(p.t)
}

var hexKey = regexp.MustCompile(`[0-9a-f]{64}`)

// named replaces keys by names.
func (p *player) named(line string) string {
	return hexKey.ReplaceAllStringFunc(line, func(s string) string {
		k := p.key(s)
		if p.names[k] == "" {
			p.call(k, fmt.Sprintf("new%d", len(p.names)))
		}
		return p.names[k]
	})
}

// Every scenario gives the effects that its file says, and no status and no rule
// is left out. compat: LLB-007, LLB-C73, LLB-170, LLB-171, LLB-172, LLB-173
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) < 25 {
		t.Fatalf("%d scenarios: %v", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) { playFile(t, file) })
	}
}

func playFile(t *testing.T, file string) {
	old, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	p := newPlayer(t)
	var out []string
	var effects []string
	inEffects := false
	for line := range strings.Lines(string(old)) {
		line = strings.TrimSuffix(line, "\n")
		switch {
		case line == "":
			if inEffects {
				out = append(out, effects...)
				effects, inEffects = nil, false
			}
			out = append(out, line)
		case inEffects:
		case line == "----":
			inEffects = true
			out = append(out, line)
		case strings.HasPrefix(line, "#"):
			out = append(out, line)
		case strings.HasPrefix(line, "vertex "):
			p.define(line)
			out = append(out, line)
		default:
			for _, eff := range p.step(line) {
				effects = append(effects, p.named(eff))
			}
			out = append(out, line)
		}
	}
	out = append(out, effects...)
	p.end()
	got := strings.TrimRight(strings.Join(out, "\n"), "\n") + "\n"
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if got != string(old) {
		t.Errorf("%s has\n%s\ngot\n%s", file, old, got)
	}
}

// What Trace records of a build can be replayed.
func TestTraceReplays(t *testing.T) {
	var lines []string
	w := newWorld()
	s := New(Options{Keys: keygraph.NewMemory(), Results: w})
	base, other := w.vertex("base", 2), w.vertex("other", 1)
	mid := w.vertex("mid", 1, in{v: base, content: true, selector: "b"}, in{v: other, index: 0})
	top := w.vertex("top", 2, in{v: mid}, in{v: base, index: 1, content: true})
	again := w.vertex("again", 1, in{v: top, index: 1})
	again.IgnoreCache = true
	broken := w.vertex("fail", 1, in{v: again})
	broken.Name = "a \"name\"\nthat error=\"may\" confuse"
	for _, root := range []*Vertex{top, again, broken} {
		lines = nil
		b := s.NewBuild(BuildOptions{Trace: func(ev Event, effects []Effect) { lines = append(lines, trace.Lines(ev, effects)...) }})
		if r, err := b.Solve(context.Background(), Edge{Vertex: root}); err == nil {
			r.Release()
		}
		b.Close()
		replay(t, lines)
	}
	s.Close()
	w.check(t)
}

func replay(t *testing.T, lines []string) {
	t.Helper()
	p := newPlayer(t)
	for _, line := range lines {
		if announce := strings.TrimSpace(line); strings.HasPrefix(announce, "announce ") {
			p.define(announce)
		}
	}
	for len(lines) > 0 {
		event := lines[0]
		n := 1
		for n < len(lines) && strings.HasPrefix(lines[n], "  ") {
			n++
		}
		var want []string
		for _, line := range lines[1:n] {
			want = append(want, strings.TrimPrefix(line, "  "))
		}
		if got := p.step(event); !slices.Equal(got, want) {
			t.Fatalf("replay of %s:\n%s\nrecorded:\n%s", event, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		lines = lines[n:]
	}
	p.end()
}
