package trace

import (
	"cmp"
	"encoding/hex"
	"fmt"
	"regexp"
	"strings"

	"github.com/kilnbuild/kiln/solver"
	"github.com/opencontainers/go-digest"
)

// Play feeds a new core with the events of text, and returns text with the
// effects that they have now. Who writes a scenario begins with a line
// "vertex NAME inputs=A,B/1" for each vertex, may call keys, ops and contents by
// any name, and may leave out the keys of an execution's outputs. The error names
// the line that can't be played.
func Play(text string) (played string, err error) {
	p := newPlayer()
	p.named = !hexKey.MatchString(text)
	number, current := 0, ""
	defer func() {
		if r := recover(); r != nil { // an event that can't be at this place
			err = fmt.Errorf("line %d, %s: the core panics: %v", number, current, r)
		}
	}()
	for current = range strings.Lines(text) {
		number++
		current = strings.TrimSuffix(current, "\n")
		if p.line(current); p.err != nil {
			return "", fmt.Errorf("line %d, %s: %w", number, current, p.err)
		}
	}
	p.flush()
	p.core.Release()
	if p.live != 0 {
		return "", fmt.Errorf("%d results were not given back", p.live)
	}
	return strings.TrimRight(strings.Join(p.out, "\n"), "\n") + "\n", nil
}

// player feeds a core with lines of the text format.
type player struct {
	core     *solver.Core
	vertices map[string]*solver.Vertex
	started  map[string][]solver.Effect // that have an outcome, by what it begins with, the oldest first
	live     int                        // handles of results
	err      error                      // what is wrong with the line

	out, effects []string
	inEffects    bool // after a "----"

	named bool // keys have names: the text has none in hex, it was written by hand
	names map[solver.Key]string
	keys  map[string]solver.Key
}

func newPlayer() *player {
	return &player{
		core: solver.NewCore(), vertices: map[string]*solver.Vertex{}, started: map[string][]solver.Effect{},
		names: map[solver.Key]string{}, keys: map[string]solver.Key{},
	}
}

// fail notes what is wrong with the line.
func (p *player) fail(format string, args ...any) {
	p.err = cmp.Or(p.err, fmt.Errorf(format, args...))
}

func (p *player) line(line string) {
	switch {
	case line == "":
		p.flush()
	case p.inEffects:
		return
	case line == "----":
		p.inEffects = true
	case strings.HasPrefix(line, "#"):
	case strings.HasPrefix(line, "vertex "):
		p.define(line)
	default:
		p.step(line)
	}
	p.out = append(p.out, line)
}

// flush writes the effects so far, if the text has a place for them.
func (p *player) flush() {
	if p.inEffects {
		p.out = append(p.out, p.effects...)
		p.effects, p.inEffects = nil, false
	}
}

// step feeds one line. What an effect owns is given back.
func (p *player) step(line string) {
	ev := p.event(line)
	if p.err != nil {
		return
	}
	for _, eff := range p.core.Step(ev) {
		p.effects = append(p.effects, p.rename(Effect(eff)))
		if name := outcomeOf(eff); name != "" {
			p.started[name] = append(p.started[name], eff)
		}
		switch eff := eff.(type) {
		case *solver.Release:
			eff.Result.Release()
		case *solver.Digest:
			eff.Result.Release()
		case *solver.Answer:
			releaseIfAny(eff.Result)
		case *solver.Adopt:
			releaseIfAny(eff.Save.Result)
		case *solver.Execute:
			for _, r := range eff.Inputs {
				r.Release()
			}
		}
	}
}

func releaseIfAny(r solver.Result) {
	if r != nil {
		r.Release()
	}
}

// outcomeOf is how the line of the outcome of eff begins; "" if it has none.
func outcomeOf(eff solver.Effect) string {
	switch e := eff.(type) {
	case *solver.GetCacheMap:
		return "cachemap " + vertex(e.Vertex)
	case *solver.Query:
		return "lookup " + edge(e.Edge)
	case *solver.Load:
		return "load " + edge(e.Edge) + " " + e.Record.String()
	case *solver.Execute:
		return "execute " + vertex(e.Vertex)
	case *solver.Digest:
		return fmt.Sprintf("digest %s %d", vertex(e.Vertex), e.Input)
	}
	return ""
}

// cause is the effect whose outcome begins with w's first fields.
func cause[E solver.Effect](p *player, w words, fields int) (eff E, ok bool) {
	name := strings.Join(w.fields[:min(fields, len(w.fields))], " ")
	waiting := p.started[name]
	if len(waiting) > 0 {
		eff, ok = waiting[0].(E)
	}
	if !ok {
		p.fail("%q was not started", name)
		return eff, false
	}
	p.started[name] = waiting[1:]
	return eff, true
}

// key is hex, or what a scenario calls a key.
func (p *player) key(s string) solver.Key {
	if b, err := hex.DecodeString(s); err == nil && len(b) == len(solver.Key{}) {
		return solver.Key(b)
	}
	if k, ok := p.keys[s]; ok {
		return k
	}
	k := solver.RootKey(digest.Digest("key "+s), 0)
	p.call(k, s)
	return k
}

func (p *player) call(k solver.Key, name string) {
	if p.names[k] == "" {
		p.names[k], p.keys[name] = name, k
	}
}

// callOp gives the keys of an op without inputs names.
func (p *player) callOp(op digest.Digest) {
	p.call(solver.RootKey(op, 0), fmt.Sprintf("root(%s)", op))
	p.call(solver.RootKey(op, 1), fmt.Sprintf("root(%s/1)", op))
}

var hexKey = regexp.MustCompile(`[0-9a-f]{64}`)

// rename replaces keys by names.
func (p *player) rename(line string) string {
	if !p.named {
		return line
	}
	return hexKey.ReplaceAllStringFunc(line, func(s string) string {
		k := p.key(s)
		if p.names[k] == "" {
			p.call(k, fmt.Sprintf("new%d", len(p.names)))
		}
		return p.names[k]
	})
}

// handle is one on a result of which nothing is known but its name.
type handle struct {
	p        *player
	id       string
	released bool
}

func (p *player) result(id string) solver.Result {
	p.live++
	return &handle{p: p, id: id}
}

func (h *handle) ID() string           { return h.id }
func (h *handle) Clone() solver.Result { return h.p.result(h.id) }

func (h *handle) Release() {
	if h.released {
		h.p.fail("result %s is released twice", h.id)
	}
	h.released = true
	h.p.live--
}
