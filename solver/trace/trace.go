// Package trace is the text format of a build: a line for every event and
// effect of a solver.Core, made of words. Each event, or several, is followed by
// "----" and the effects. What is recorded of a build, for example by whoever
// reports a defect, is a scenario that Play replays, as those that were written
// by hand are: solver/testdata/*.txt.
//
// A vertex is its digest, with a "!" if it ignores the cache; an edge other than
// the first output is vertex/output; keys are hex; what people wrote (names,
// reasons, errors) is quoted, and last.
package trace

import (
	"errors"
	"fmt"
	"strings"

	"github.com/kilnbuild/kiln/solver"
)

// Lines is what Play needs of ev and what followed from it, after an empty line:
// the vertices that ev brought, ev, and a line for each effect.
func Lines(ev solver.Event, effects []solver.Effect) []string {
	out := []string{""}
	for _, eff := range effects {
		if a, ok := eff.(*solver.Announce); ok {
			out = append(out, line("vertex", announced(a)))
		}
	}
	out = append(out, Event(ev), "----")
	for _, eff := range effects {
		out = append(out, Effect(eff))
	}
	return out
}

// Event is the line of ev.
func Event(ev solver.Event) string {
	switch ev := ev.(type) {
	case *solver.Requested:
		return fmt.Sprintf("request %d %s", ev.Call, edge(ev.Edge))
	case *solver.Abandoned:
		return fmt.Sprintf("abandon %d", ev.Call)
	case *solver.FoundLost:
		return line("found lost", edge(ev.Edge), ev.Record, outcome(ev.Err))
	case *solver.GotCacheMap:
		return line("cachemap", vertex(ev.Vertex), cacheMap(ev.Map), mark("more", ev.More), outcome(ev.Err))
	case *solver.Queried:
		return line("lookup", edge(ev.Edge), found(ev.Found))
	case *solver.Loaded:
		return line("load", edge(ev.Edge), ev.Record.String(), loadedAs(ev), mark("gone", errors.Is(ev.Err, solver.ErrNoResult)), outcome(ev.Err))
	case *solver.Digested:
		return line("digest", vertex(ev.Vertex), fmt.Sprint(ev.Input), mark("content="+string(ev.Content), ev.Err == nil), outcomeOrLoss(ev.Err))
	case *solver.Executed:
		return line("execute", vertex(ev.Vertex), list("outputs", ev.Outputs, output),
			mark("cached", ev.Cached), mark("unwanted", errors.Is(ev.Err, solver.ErrUnwanted)), outcomeOrLoss(ev.Err))
	}
	return fmt.Sprintf("internal error: event of unknown kind %T", ev)
}

// Effect is the line of eff.
func Effect(eff solver.Effect) string {
	switch e := eff.(type) {
	case *solver.Announce:
		return line("announce", announced(e))
	case *solver.GetCacheMap:
		return fmt.Sprintf("get cachemap %d of %s", e.Index, vertex(e.Vertex))
	case *solver.Query:
		return line("start lookup", edge(e.Edge), lookup(e.Lookup))
	case *solver.Load:
		return fmt.Sprintf("start load %s %s %q", edge(e.Edge), e.Record, e.Reason)
	case *solver.Digest:
		return fmt.Sprintf("start digest %s %d of %s", vertex(e.Vertex), e.Input, e.Result.ID())
	case *solver.Execute:
		return line("start execute", vertex(e.Vertex), list("inputs", e.Inputs, solver.Result.ID), list("saves", e.Wanted, wanted), fmt.Sprintf("%q", e.Reason))
	case *solver.Cancel:
		return "cancel " + vertex(e.Execute.Vertex)
	case *solver.Cached:
		return "cached " + vertex(e.Vertex)
	case *solver.Link:
		return "link " + save(e.Save)
	case *solver.Adopt:
		result := e.Record.String()
		if e.Save.Result != nil {
			result = e.Save.Result.ID()
		}
		return line("adopt", save(e.Save), mark("result="+result, result != ""))
	case *solver.Drop:
		return fmt.Sprintf("drop %s %q", strings.Join(e.Records, ","), e.Reason)
	case *solver.Release:
		return "release " + e.Result.ID()
	case *solver.Answer:
		if e.Err != nil {
			return line("answer", fmt.Sprint(e.Call), outcome(e.Err))
		}
		return fmt.Sprintf("answer %d %s", e.Call, e.Result.ID())
	}
	return fmt.Sprintf("internal error: effect of unknown kind %T", eff)
}
