package verify

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

func TestEqual(t *testing.T) {
	s := newSite(t, 1)
	a := s.step("a", "out=1")
	a.source = true
	b, c := s.step("b", "b=2"), s.step("c", "c=3")
	top := c.vertex(b.vertex(a.vertex()))
	s.build(top, true) // no hits: everything runs
	s.build(top, true)
	for range 2 { // what is shown as cached below the hit is one too; sources aren't run again
		s.expect("DEBUG", "is what its step makes")
	}
	s.counts(map[Outcome]int{Equal: 2})
	if a.count() != 1 || b.count() != 2 || c.count() != 2 {
		t.Errorf("executed %d, %d, %d times", a.count(), b.count(), c.count())
	}
}

func TestNondeterministic(t *testing.T) {
	s := newSite(t, 1)
	a, b := s.step("a", "out=1"), s.step("b")
	a.source = true
	b.make = func(run int, _ []string) map[string]string {
		out := map[string]string{"same": "x", fmt.Sprintf("made%d", run): ""}
		for i := range 20 {
			out[fmt.Sprintf("random%02d", i)] = fmt.Sprint(run)
		}
		return out
	}
	v := b.vertex(a.vertex())
	s.build(v, false)
	id := s.build(v, true)
	line := s.expect("WARN", "isn't deterministic", "/random00 (content)", "/made2 (in one execution only)", "more=12", id)
	if strings.Contains(line, "/same") {
		t.Errorf("what is the same is named: %s", line)
	}
	if b.count() != 3 {
		t.Errorf("executed %d times, want once for the build and twice to verify", b.count())
	}
	if again := s.build(v, false); again != id {
		t.Error("the record is gone")
	}
	s.counts(map[Outcome]int{Nondeterministic: 1})
}

// What depends on the clock isn't the cache's fault.
func TestClock(t *testing.T) {
	s := newSite(t, 1)
	s.v.cfg.Apart = 1100 * time.Millisecond
	a, b := s.step("a", "out=1"), s.step("b")
	a.source = true
	b.make = func(run int, _ []string) map[string]string {
		if run == 1 {
			return map[string]string{"time": "earlier"}
		}
		return map[string]string{"time": time.Now().Format(time.TimeOnly)}
	}
	v := b.vertex(a.vertex())
	s.build(v, false)
	s.build(v, true)
	s.expect("WARN", "isn't deterministic", "/time (content)")
}

// The same hit of several builds is verified once, also if it was reached from
// vertices of other names.
func TestHitsAreVerifiedOnce(t *testing.T) {
	s := newSite(t, 1)
	a, b := s.step("a", "out=1"), s.step("b", "b=2")
	a.source = true
	s.build(b.vertex(a.vertex()), false)
	w := s.v.Watch() // nothing is verified before this ends
	for i := range 3 {
		v := b.vertex(a.vertex())
		v.Digest = digest.FromString(fmt.Sprint(i))
		s.build(v, true)
	}
	if n := s.v.Summary().Queued; n != 1 {
		t.Errorf("%d checks wait, want 1", n)
	}
	w.End()
	s.expect("is what its step makes")
}

// A record whose files were changed is forgotten, and so is what was made of
// it: the next build executes both again.
func TestWrong(t *testing.T) {
	s := newSite(t, 1)
	a, b := s.step("a", "out=1"), s.step("b", "out=2", "b=2")
	a.source = true
	layer, copied := s.step("layer", "c=3"), s.step("copied")
	copied.alone = true
	copied.make = func(_ int, in []string) map[string]string { return map[string]string{"copy": in[0]} }
	below := b.vertex(a.vertex())
	id := s.build(below, false)
	s.damage(id, "b", "9")
	s.build(layer.vertex(below), false)
	s.build(copied.vertex(below), false)

	s.build(below, true)
	s.expect("ERROR", "was wrong", "/b (content)", "more=0", id, "forgotten=3")
	s.counts(map[Outcome]int{Wrong: 1})
	if f := s.v.Summary().Findings; len(f) != 1 || f[0].Outcome != Wrong || f[0].Forgotten != 3 {
		t.Errorf("findings %+v", f)
	}
	before := []int{a.count(), b.count(), layer.count(), copied.count()}
	if now := s.build(layer.vertex(below), false); now == id {
		t.Error("the wrong record is still used")
	}
	s.build(copied.vertex(below), false)
	for i, st := range []*step{a, b, layer, copied} {
		want := before[i] + 1
		if i == 0 {
			want = before[i] // it isn't in question
		}
		if st.count() != want {
			t.Errorf("%s was executed %d times in all, want %d", st.name, st.count(), want)
		}
	}
	s.build(below, true)
	s.expect("DEBUG", "is what its step makes")
}

// A record of an input that was made later, by a build without the cache, isn't
// what the record was made from: that it differs proves nothing.
func TestUnsure(t *testing.T) {
	s := newSite(t, 1)
	a, b := s.step("a"), s.step("b")
	a.source = true
	a.make = func(run int, _ []string) map[string]string { return map[string]string{"out": fmt.Sprint(run)} }
	b.alone = true
	b.make = func(_ int, in []string) map[string]string { return map[string]string{"copy": in[0]} }
	v := b.vertex(a.vertex())
	id := s.build(v, false)
	uncached := a.vertex()
	uncached.IgnoreCache = true
	s.build(uncached, false)
	s.build(v, true)
	s.expect("is what its step makes") // the older input is still there
	s.counts(map[Outcome]int{Equal: 1})

	found, err := s.keys.Lookup(rootLookup(a))
	must(t, err)
	must(t, s.keys.Drop([]string{found.Records[len(found.Records)-1].Result}))
	if again := s.build(v, true); again != id {
		t.Fatal("no hit")
	}
	s.expect("INFO", "made again since", "/copy (content)")
	s.counts(map[Outcome]int{Equal: 1, Unsure: 1})
}

// A step that is matched by content runs on what the build has made of its
// input; if that leads to something else, what it reads isn't what was digested.
func TestContentThatDoesNotTell(t *testing.T) {
	s := newSite(t, 1)
	base, a, b := s.step("base", "out="), s.step("a"), s.step("b")
	base.source, b.content = true, true
	a.make = func(run int, _ []string) map[string]string {
		return map[string]string{"out": "same", "more": fmt.Sprint(run)}
	}
	b.make = func(int, []string) map[string]string { return map[string]string{"b": "2"} }
	fresh := func() *step { // what a makes each time is found by its content only
		again := a.vertex(base.vertex())
		again.IgnoreCache = true
		s.build(b.vertex(again), true)
		return b
	}
	w := s.v.Watch() // nothing is verified before this ends
	fresh()
	if n := fresh().count(); n != 1 {
		t.Errorf("executed %d times, want a hit by content", n)
	}
	w.End()
	s.expect("ERROR", "was wrong", "/more (content)")
}

func TestSkippedAndFailed(t *testing.T) {
	s := newSite(t, 1)
	a, b, c := s.step("a", "out=1"), s.step("b", "b=2"), s.step("c", "c=3")
	a.source = true
	b.alone = true
	v := b.vertex(a.vertex())
	s.build(v, false)
	found, err := s.keys.Lookup(rootLookup(a))
	must(t, err)
	must(t, s.keys.Drop([]string{found.Records[0].Result}))
	s.build(v, true)
	s.expect("DEBUG", "can't be verified", "no longer in the cache")
	s.counts(map[Outcome]int{Skipped: 1})

	w := c.vertex(a.vertex())
	s.build(w, false)
	c.err = errors.New("the network is down")
	s.build(w, true)
	s.expect("WARN", "fails when it is executed again", c.err.Error())
	c.err = nil
	c.make = func(int, []string) map[string]string { panic("ouch") }
	s.build(w, true)
	s.expect("WARN", "fails when it is executed again", "panic: ouch")
	s.counts(map[Outcome]int{Skipped: 1, Failed: 2})
}

// A build that begins ends the check at once; it starts over when the build is
// over. After some tries it is given up.
func TestBuildsComeFirst(t *testing.T) {
	s := newSite(t, 1)
	a, b := s.step("a", "out=1"), s.step("b", "b=2")
	a.source = true
	v := b.vertex(a.vertex())
	s.build(v, false)
	b.enter, b.leave = make(chan context.Context), make(chan struct{})
	s.build(v, true)
	for range maxTries - 1 {
		ctx := <-b.enter
		w := s.v.Watch()
		<-ctx.Done()
		w.End()
	}
	<-b.enter
	b.leave <- struct{}{}
	s.expect("is what its step makes")
	s.counts(map[Outcome]int{Equal: 1})

	s.build(v, true)
	for range maxTries {
		ctx := <-b.enter
		w := s.v.Watch()
		<-ctx.Done()
		w.End()
	}
	s.expect("DEBUG", "can't be verified", "builds came too often")
	b.enter, b.leave = nil, nil
	s.build(v, true)
	s.expect("is what its step makes")
	s.counts(map[Outcome]int{Equal: 2, Skipped: 1})
}

// The end of the daemon doesn't wait for a step.
func TestCloseStopsACheck(t *testing.T) {
	s := newSite(t, 1)
	a, b := s.step("a", "out=1"), s.step("b", "b=2")
	a.source = true
	v := b.vertex(a.vertex())
	s.build(v, false)
	b.enter = make(chan context.Context)
	s.build(v, true)
	<-b.enter
	s.v.Close()
	s.counts(map[Outcome]int{})
	s.v = New(s.v.cfg) // for the cleanup
}

func TestShare(t *testing.T) {
	for _, share := range []float64{0, 0.5} {
		s := newSite(t, share)
		v := s.step("b", "b=2").vertex(func() *step { a := s.step("a", "out=1"); a.source = true; return a }().vertex())
		s.build(v, false)
		w := s.v.Watch() // nothing runs before this ends
		offered := 0
		for i := range 1000 {
			task := &task{vertex: v, hits: map[int]hit{0: {}}}
			task.hits[0] = hit{record: recordNamed(fmt.Sprint(i))}
			s.v.mu.Lock()
			s.v.offerLocked(task)
			offered = len(s.v.queued) + s.v.results.counts[Skipped]
			s.v.mu.Unlock()
		}
		if want := 1000 * share; float64(offered) < want*0.8 || float64(offered) > want*1.2 {
			t.Errorf("share %v: %d of 1000", share, offered)
		}
		if n := s.v.Summary().Queued; n > maxQueue {
			t.Errorf("%d wait", n)
		}
		s.v.mu.Lock()
		s.v.queue = nil
		s.v.mu.Unlock()
		w.End()
	}
}
