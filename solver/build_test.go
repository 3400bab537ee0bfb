package solver_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/kilnbuild/kiln/internal/progress"
	. "github.com/kilnbuild/kiln/solver"
	"github.com/kilnbuild/kiln/solver/keygraph"
	"github.com/kilnbuild/kiln/solver/trace"
	"github.com/opencontainers/go-digest"
)

// recorder is a progress.Writer that keeps what it gets.
type recorder struct {
	mu     sync.Mutex // guards events
	events []progress.Event
}

func (r *recorder) Write(e progress.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, e)
}

// story tells what watchers were told of v.
func (r *recorder) story(v digest.Digest) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []string
	for _, e := range r.events {
		switch {
		case e.Vertex != nil && e.Vertex.Digest == v:
			out = append(out, stage(e.Vertex))
		case e.Log != nil && e.Log.Vertex == v:
			out = append(out, string(e.Log.Data))
		}
	}
	return strings.Join(out, "; ")
}

// started is when v is shown to have started.
func (r *recorder) started(v *Vertex) (at time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.events {
		if e.Vertex != nil && e.Vertex.Digest == v.Digest && e.Vertex.Started != nil {
			at = *e.Vertex.Started
		}
	}
	return at
}

func stage(v *progress.Vertex) string {
	switch {
	case v.Started == nil && v.Completed == nil && !v.Cached && v.Error == "":
		return "announced"
	case v.Cached && v.Started != nil && v.Completed != nil && v.Started.Equal(*v.Completed):
		return "cached"
	case v.Started != nil && v.Completed == nil && v.Error == "":
		return "started"
	case v.Started != nil && v.Completed != nil && v.Error != "":
		return "failed: " + v.Error
	case v.Started != nil && v.Completed != nil:
		return "completed"
	}
	return fmt.Sprintf("nonsense %+v", v)
}

func (r *recorder) expect(t *testing.T, v *Vertex, want string) {
	t.Helper()
	if got := r.story(v.Digest); got != want {
		t.Errorf("%s: %s\nwant %s", v.Name, got, want)
	}
}

// site is a solver with a world, for one test in a bubble.
type site struct {
	t *testing.T
	w *world
	s *Solver
}

func inSite(t *testing.T, fn func(t *testing.T, s *site)) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		s := &site{t: t, w: w, s: New(Options{Keys: keygraph.NewMemory(), Results: w})}
		fn(t, s)
		s.s.Close()
		w.check(t)
	})
}

// build solves v in a build of its own.
func (s *site) build(v *Vertex) (*recorder, progress.Counts, error) {
	rec := &recorder{}
	b := s.s.NewBuild(BuildOptions{Progress: rec})
	defer b.Close()
	r, err := b.Solve(context.Background(), Edge{Vertex: v})
	if err == nil {
		r.Release()
	}
	return rec, b.Stats(), err
}

// A vertex is announced once, with its inputs and without times; then it starts
// and completes. compat: CTL-065, CTL-066
func TestProgressOfExecution(t *testing.T) {
	inSite(t, func(t *testing.T, s *site) {
		a := s.w.vertex("a", 1)
		a.Group = &progress.Group{ID: "g"}
		b := s.w.vertex("b", 1, in{v: a}, in{v: a, selector: "a"})
		rec, stats, err := s.build(b)
		if err != nil {
			t.Fatal(err)
		}
		rec.expect(t, a, "announced; started; ran a; completed")
		rec.expect(t, b, "announced; started; ran b; completed")
		if stats != (progress.Counts{Total: 2, Completed: 2}) {
			t.Errorf("stats %+v", stats)
		}
		if v := rec.events[1].Vertex; v.Name != "b" || !slices.Equal(v.Inputs, []digest.Digest{a.Digest, a.Digest}) {
			t.Errorf("announced %+v", v)
		}
		if v := rec.events[0].Vertex; v.Group != a.Group {
			t.Errorf("announced %+v without its group", v)
		}
	})
}

// A vertex that was loaded, what it stands on, and an input that nothing was
// done for but that is consumed, are cached. compat: CTL-067
func TestProgressOfCached(t *testing.T) {
	inSite(t, func(t *testing.T, s *site) {
		a := s.w.vertex("a", 1)
		b := s.w.vertex("b", 1, in{v: a})
		s.build(b)
		rec, stats, _ := s.build(b)
		rec.expect(t, a, "announced; cached")
		rec.expect(t, b, "announced; cached")
		if stats != (progress.Counts{Total: 2, Completed: 2, Cached: 2}) {
			t.Errorf("stats %+v", stats)
		}
		c := s.w.vertex("c", 1, in{v: b})
		rec, stats, _ = s.build(c)
		rec.expect(t, a, "announced; cached")
		rec.expect(t, b, "announced; cached")
		rec.expect(t, c, "announced; started; ran c; completed")
		if stats != (progress.Counts{Total: 3, Completed: 3, Cached: 2}) {
			t.Errorf("stats %+v", stats)
		}
	})
}

// The error is that of the vertex, in plain text; those who need it are not
// blamed. What succeeded before is reused. compat: CTL-069, LLB-178
func TestProgressOfFailure(t *testing.T) {
	inSite(t, func(t *testing.T, s *site) {
		a := s.w.vertex("a", 1)
		bad := s.w.vertex("fail", 1, in{v: a})
		top := s.w.vertex("top", 1, in{v: bad})
		for range 2 {
			rec, _, err := s.build(top)
			var ve *VertexError
			if !errors.As(err, &ve) || ve.Vertex != bad || !errors.Is(err, errStep) {
				t.Errorf("error %v", err)
			}
			rec.expect(t, bad, "announced; started; failed: exit code 1")
			rec.expect(t, top, "announced")
		}
		if n := s.w.executions()[identity("a", nil)]; n != 1 {
			t.Errorf("a step of a failed build was executed %d times", n)
		}
	})
}

// gate is a step that runs until it is let go.
type gate struct {
	entered chan Asker // gets who asks, once it runs
	leave   chan error
}

func (s *site) gated(v *Vertex) *gate {
	g := &gate{entered: make(chan Asker, 8), leave: make(chan error)}
	v.Op.(*step).before = func(ctx context.Context, asker Asker) error {
		progress.From(ctx).Stream(1).Write([]byte("begins"))
		g.entered <- asker
		select {
		case err := <-g.leave:
			return err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return g
}

// client is a build with one request under way.
type client struct {
	b      *Build
	rec    *recorder
	cancel context.CancelFunc
	err    chan error
}

func (s *site) client(v *Vertex, opts BuildOptions) *client {
	c := &client{rec: &recorder{}, err: make(chan error, 1)}
	opts.Progress = c.rec
	c.b = s.s.NewBuild(opts)
	ctx, cancel := context.WithCancel(context.Background())
	c.cancel = cancel
	go func() {
		r, err := c.b.Solve(ctx, Edge{Vertex: v})
		if r != nil {
			r.Release()
		}
		c.err <- err
	}()
	return c
}

// Started and never completed is completed with the end of the build.
// compat: CTL-068
func TestProgressOfInterrupted(t *testing.T) {
	inSite(t, func(t *testing.T, s *site) {
		a := s.w.vertex("a", 1)
		g := s.gated(a)
		c := s.client(a, BuildOptions{})
		<-g.entered
		synctest.Wait()
		c.b.Close()
		if err := <-c.err; !errors.Is(err, ErrClosed) {
			t.Errorf("error %v", err)
		}
		c.rec.expect(t, a, "announced; started; begins; failed: context canceled")
		if _, err := c.b.Solve(context.Background(), Edge{Vertex: a}); !errors.Is(err, ErrClosed) {
			t.Errorf("solve after close: %v", err)
		}
		c.b.Close() // again is fine
		c.cancel()
	})
}

// Builds that want the same join: it runs once, and who comes late sees the log
// from the start, and that it started then. compat: CTL-045, CTL-078, X-2
func TestFlightIsShared(t *testing.T) {
	inSite(t, func(t *testing.T, s *site) {
		a := s.w.vertex("a", 1)
		g := s.gated(a)
		first := s.client(a, BuildOptions{Value: "first"})
		asker := <-g.entered
		synctest.Wait()
		<-time.After(time.Minute) // of the bubble
		second := s.client(a, BuildOptions{Value: "second"})
		synctest.Wait()
		if early, late := first.rec.started(a), second.rec.started(a); !early.Equal(late) {
			t.Errorf("started %s, and as seen by who came later %s", early, late)
		}
		if got := fmt.Sprint(asker.Values()); got != "[first second]" {
			t.Errorf("waiting: %s", got)
		}
		g.leave <- nil
		for _, c := range []*client{first, second} {
			if err := <-c.err; err != nil {
				t.Error(err)
			}
			c.b.Close()
			c.rec.expect(t, a, "announced; started; begins; ran a; completed")
			c.cancel()
		}
		if got := fmt.Sprint(asker.Values()); got != "[first second]" {
			t.Errorf("got the result: %s", got)
		}
		if got := describe(s.w.executions()); got != "1 a()" {
			t.Errorf("executed %s", got)
		}
	})
}

// Who leaves doesn't cancel it for the others; the last one does.
// compat: CTL-044, X-3
func TestFlightOutlivesWhoLeaves(t *testing.T) {
	inSite(t, func(t *testing.T, s *site) {
		a := s.w.vertex("a", 1)
		g := s.gated(a)
		first := s.client(a, BuildOptions{Value: "first"})
		asker := <-g.entered
		second := s.client(a, BuildOptions{Value: "second"})
		synctest.Wait()
		first.cancel()
		if err := <-first.err; !errors.Is(err, context.Canceled) {
			t.Errorf("who left got %v", err)
		}
		first.b.Close()
		if got := fmt.Sprint(asker.Values()); got != "[second]" {
			t.Errorf("waiting: %s", got)
		}
		third := s.client(a, BuildOptions{Value: "third"})
		synctest.Wait()
		second.cancel()
		third.cancel()
		for _, c := range []*client{second, third} {
			if err := <-c.err; !errors.Is(err, context.Canceled) {
				t.Errorf("who left got %v", err)
			}
			c.b.Close()
		}
		if got := s.w.executions(); len(got) != 0 {
			t.Errorf("executed %s", describe(got))
		}
		// Nothing of that is remembered as a failure.
		fourth := s.client(a, BuildOptions{})
		<-g.entered
		g.leave <- nil
		if err := <-fourth.err; err != nil {
			t.Error(err)
		}
		fourth.b.Close()
		fourth.cancel()
	})
}

// A failure is that of all who wait, unless it may be due to one who has left:
// then the others try themselves. compat: CTL-096, X-3
func TestFlightFails(t *testing.T) {
	for _, leaves := range []bool{false, true} {
		t.Run(fmt.Sprintf("leaves=%v", leaves), func(t *testing.T) {
			inSite(t, func(t *testing.T, s *site) {
				a := s.w.vertex("a", 1)
				g := s.gated(a)
				first := s.client(a, BuildOptions{})
				<-g.entered
				second := s.client(a, BuildOptions{})
				synctest.Wait()
				if leaves {
					first.cancel()
					synctest.Wait()
				}
				cause := errors.New("session is gone")
				g.leave <- cause
				want := cause
				if leaves {
					<-g.entered
					g.leave <- nil
					want = nil
				}
				if err := <-second.err; !errors.Is(err, want) {
					t.Errorf("who stayed got %v, want %v", err, want)
				}
				if err := <-first.err; err == nil || !leaves && !errors.Is(err, cause) {
					t.Errorf("the first got %v", err)
				}
				for _, c := range []*client{first, second} {
					c.b.Close()
					c.cancel()
				}
			})
		})
	}
}

// Who joined a flight finds what it brought by what it knows itself, though the
// one that started it knew it by other keys. compat: LLB-172, LLB-174
func TestFlightIsFoundByAll(t *testing.T) {
	inSite(t, func(t *testing.T, s *site) {
		one, two := s.w.vertex("x", 1), s.w.vertex("x", 1)
		for i, v := range []*Vertex{one, two} { // two tags of one image
			v.Digest = digest.Digest(fmt.Sprint(i))
			v.Op.(*step).ids = []string{fmt.Sprint("tag", i), "x"}
		}
		ones, twos := s.w.vertex("y", 1, in{v: one, content: true}), s.w.vertex("y", 1, in{v: two, content: true})
		roots, steps := s.gated(one), s.gated(ones)
		two.Op.(*step).before, twos.Op.(*step).before = one.Op.(*step).before, ones.Op.(*step).before
		first, second := s.client(ones, BuildOptions{}), s.client(twos, BuildOptions{})
		for _, g := range []*gate{roots, steps} {
			<-g.entered
			synctest.Wait()
			g.leave <- nil
		}
		for _, c := range []*client{first, second} {
			if err := <-c.err; err != nil {
				t.Error(err)
			}
			c.b.Close()
			c.cancel()
		}
		if got := describe(s.w.executions()); got != "1 x()\n1 y(x/0()x/0)" {
			t.Errorf("executed:\n%s", got)
		}
		for _, v := range []*Vertex{ones, twos, one, two} {
			var lines []string
			b := s.s.NewBuild(BuildOptions{Trace: func(ev Event, effects []Effect) { lines = append(lines, trace.Lines(ev, effects)...) }})
			r, err := b.Solve(context.Background(), Edge{Vertex: v})
			if err != nil {
				t.Fatal(err)
			}
			r.Release()
			b.Close()
			if all := strings.Join(lines, "\n"); !strings.Contains(all, `"hit: by definition"`) || strings.Contains(all, "get cachemap 1") {
				t.Errorf("not found at once by definition:\n%s", all)
			}
		}
	})
}

// impatient is a ResultStore in which loads last until they are cancelled.
type impatient struct{}

func (impatient) Load(ctx context.Context, _ string) (Result, error) {
	<-ctx.Done()
	return nil, fmt.Errorf("%w: %w", ErrNoResult, context.Cause(ctx))
}

// A load that the end of the build cuts off doesn't count against the record.
func TestEndOfBuildLosesNoRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		keys := keygraph.NewMemory()
		lookup := Lookup{Op: "a", Roots: []Key{RootKey("a", 0)}}
		if err := keys.Save(Save{Lookup: lookup, Keys: lookup.Roots, Result: plainResult("r")}); err != nil {
			t.Fatal(err)
		}
		s := &site{t, w, New(Options{Keys: keys, Results: impatient{}})}
		c := s.client(w.vertex("a", 1), BuildOptions{})
		synctest.Wait()
		c.b.Close()
		// Whichever event comes after the end changes nothing.
		core := NewCore()
		c.b.Take(core, &Requested{Call: 1, Edge: Edge{Vertex: w.vertex("a", 1)}})
		if len(core.Vertices()) != 0 {
			t.Error("an event after the end of the build was taken for news")
		}
		if err := <-c.err; !errors.Is(err, ErrClosed) {
			t.Errorf("error %v", err)
		}
		c.cancel()
		s.s.Close()
		if found, _ := keys.Lookup(lookup); len(found.Records) != 1 {
			t.Error("the record was forgotten")
		}
	})
}

// Builds of different domains share nothing that runs.
func TestDomainsDontShare(t *testing.T) {
	inSite(t, func(t *testing.T, s *site) {
		a := s.w.vertex("a", 1)
		g := s.gated(a)
		first, second := s.client(a, BuildOptions{Domain: "x"}), s.client(a, BuildOptions{Domain: "y"})
		<-g.entered
		<-g.entered
		g.leave <- nil
		g.leave <- nil
		for _, c := range []*client{first, second} {
			if err := <-c.err; err != nil {
				t.Error(err)
			}
			c.b.Close()
			c.cancel()
		}
	})
}

// A step's key may say that it differs only in what its asker has.
type sharing struct {
	*step
	key func(asker Asker) (string, error)
}

func (s sharing) SharingKey(_ context.Context, asker Asker) (string, error) { return s.key(asker) }

func TestSharingKey(t *testing.T) {
	inSite(t, func(t *testing.T, s *site) {
		a := s.w.vertex("a", 1)
		g := s.gated(a)
		a.Op = sharing{a.Op.(*step), func(asker Asker) (string, error) {
			secret := asker.Values()[0].(string)
			if secret == "none" {
				return "", errors.New("no such secret")
			}
			return secret, nil
		}}
		clients := []*client{
			s.client(a, BuildOptions{Value: "one"}), s.client(a, BuildOptions{Value: "two"}), s.client(a, BuildOptions{Value: "two"}),
		}
		synctest.Wait()
		if n := len(g.entered); n != 2 {
			t.Errorf("%d run, want 2", n)
		}
		g.leave <- nil
		g.leave <- nil
		for _, c := range clients {
			if err := <-c.err; err != nil {
				t.Error(err)
			}
			c.b.Close()
			c.cancel()
		}
		b := s.w.vertex("b", 1)
		b.Op = sharing{b.Op.(*step), a.Op.(sharing).key}
		none := s.client(b, BuildOptions{Value: "none"})
		if err := <-none.err; err == nil || err.Error() != "no such secret" {
			t.Errorf("error %v", err)
		}
		none.b.Close()
		none.rec.expect(t, b, "announced; failed: no such secret")
		none.cancel()
	})
}

// What one build made of a step that it couldn't share is not taken for what another
// one made of it that ran meanwhile; who comes later has either.
func TestBuildsThatRanApart(t *testing.T) {
	inSite(t, func(t *testing.T, s *site) {
		a := s.w.vertex("a", 1)
		b := s.w.vertex("b", 1, in{v: a})
		secret := func(asker Asker) string { return asker.Values()[0].(string) }
		leave := map[string]chan struct{}{"one": make(chan struct{}), "two": make(chan struct{})}
		a.Op.(*step).before = func(_ context.Context, asker Asker) error {
			<-leave[secret(asker)]
			return nil
		}
		var ran []string // one after the other
		b.Op.(*step).before = func(_ context.Context, asker Asker) error {
			ran = append(ran, secret(asker))
			return nil
		}
		a.Op = sharing{a.Op.(*step), func(asker Asker) (string, error) { return secret(asker), nil }}
		builds := map[string]*client{}
		for name := range leave {
			builds[name] = s.client(b, BuildOptions{Value: name})
		}
		synctest.Wait()
		for _, name := range []string{"one", "two"} {
			close(leave[name])
			if err := <-builds[name].err; err != nil {
				t.Error(err)
			}
		}
		builds["three"] = s.client(b, BuildOptions{Value: "three"})
		if err := <-builds["three"].err; err != nil {
			t.Error(err)
		}
		if !slices.Equal(ran, []string{"one", "two"}) {
			t.Errorf("%q ran what stands on the step", ran)
		}
		for _, c := range builds {
			c.b.Close()
			c.cancel()
		}
	})
}

// limited counts the slots that are taken.
type limited struct {
	*step
	slots chan struct{}
}

func (l limited) Acquire(ctx context.Context) (func(), error) {
	select {
	case l.slots <- struct{}{}:
		return func() { <-l.slots }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Executions take a slot of their op's limit, give it back even when they panic,
// and give up waiting for one when nobody wants them. compat: LLB-035
func TestLimit(t *testing.T) {
	inSite(t, func(t *testing.T, s *site) {
		slots := make(chan struct{}, 1)
		a, b, c := s.w.vertex("a", 1), s.w.vertex("b", 1), s.w.vertex("c", 1)
		g := s.gated(a)
		b.Op.(*step).before = func(context.Context, Asker) error { panic("out of cheese") }
		for _, v := range []*Vertex{a, b, c} {
			v.Op = limited{v.Op.(*step), slots}
		}
		first := s.client(a, BuildOptions{})
		<-g.entered
		waits, gives := s.client(b, BuildOptions{}), s.client(c, BuildOptions{})
		synctest.Wait()
		gives.cancel()
		if err := <-gives.err; !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
		g.leave <- nil
		if err := <-first.err; err != nil {
			t.Error(err)
		}
		if err := <-waits.err; err == nil || !strings.Contains(err.Error(), "internal error: b panicked: out of cheese") {
			t.Errorf("error %v", err)
		}
		for _, c := range []*client{first, waits, gives} {
			c.b.Close()
			c.cancel()
		}
		if len(slots) != 0 {
			t.Error("a slot was never given back")
		}
	})
}

// small is a step of which a build executes a few at a time.
type small struct{ *step }

func (small) Small() {}

// smallSteps are more than are executed at once, and what stands on them all.
func (s *site) smallSteps(before func(context.Context, Asker) error) (top *Vertex, all []*Vertex) {
	var inputs []in
	for i := range 2*CrewSize + 1 {
		v := s.w.vertex(fmt.Sprint("small", i), 1)
		v.Op.(*step).before = before
		v.Op = small{v.Op.(*step)}
		all, inputs = append(all, v), append(inputs, in{v: v})
	}
	return s.w.vertex("top", 1, inputs...), all
}

// Of many small ops that are possible at once a few run, and all do in the end.
func TestManySmallOps(t *testing.T) {
	inSite(t, func(t *testing.T, s *site) {
		var running, tooMany atomic.Int32
		leave := make(chan struct{})
		top, all := s.smallSteps(func(context.Context, Asker) error {
			if running.Add(1) > CrewSize {
				tooMany.Add(1)
			}
			defer running.Add(-1)
			<-leave
			return nil
		})
		c := s.client(top, BuildOptions{})
		synctest.Wait()
		if n := running.Load(); n != CrewSize {
			t.Errorf("%d run, want %d", n, CrewSize)
		}
		close(leave)
		if err := <-c.err; err != nil {
			t.Error(err)
		}
		c.b.Close()
		c.cancel()
		for _, v := range all {
			if n := s.w.runs[v.Digest]; n != 1 {
				t.Errorf("%s ran %d times", v.Name, n)
			}
		}
		if n := tooMany.Load(); n > 0 {
			t.Errorf("%d ops ran beside %d others or more", n, CrewSize)
		}
	})
}

// What nobody wants any more when its turn comes isn't begun.
func TestSmallOpsAreGivenUp(t *testing.T) {
	inSite(t, func(t *testing.T, s *site) {
		var begun atomic.Int32
		top, _ := s.smallSteps(func(ctx context.Context, _ Asker) error {
			begun.Add(1)
			<-ctx.Done()
			return context.Cause(ctx)
		})
		c := s.client(top, BuildOptions{})
		synctest.Wait()
		c.b.Close()
		if err := <-c.err; !errors.Is(err, ErrClosed) {
			t.Errorf("error %v", err)
		}
		c.cancel()
		if n := begun.Load(); n != CrewSize {
			t.Errorf("%d were begun, want %d", n, CrewSize)
		}
	})
}

// The digest of a vertex that ignores the cache beside one that doesn't is its
// own; what depends on it says so. compat: CTL-065, LLB-007
func TestProgressOfTwin(t *testing.T) {
	inSite(t, func(t *testing.T, s *site) {
		plain := s.w.vertex("a", 1)
		twin := *plain
		twin.IgnoreCache = true
		top := s.w.vertex("top", 1, in{v: &twin})
		rec := &recorder{}
		b := s.s.NewBuild(BuildOptions{Progress: rec})
		for _, v := range []*Vertex{plain, top} {
			r, err := b.Solve(context.Background(), Edge{Vertex: v})
			if err != nil {
				t.Fatal(err)
			}
			r.Release()
		}
		b.Close()
		variant := digest.FromString(string(plain.Digest) + "-ignorecache")
		rec.expect(t, plain, "announced; started; ran a; completed")
		if got := rec.story(variant); got != "announced; started; ran a; completed" {
			t.Errorf("the twin: %s", got)
		}
		for _, e := range rec.events {
			if e.Vertex != nil && e.Vertex.Digest == top.Digest && !slices.Equal(e.Vertex.Inputs, []digest.Digest{variant}) {
				t.Errorf("top has inputs %v", e.Vertex.Inputs)
			}
		}
	})
}

// A key store that can't be read or written costs the cache, not the build.
type brokenKeys struct{}

var errBroken = errors.New("disk is broken")

func (brokenKeys) Lookup(Lookup) (Found, error) { return Found{}, errBroken }
func (brokenKeys) Save(Save) error              { return errBroken }
func (brokenKeys) Drop([]string) error          { return errBroken }

func TestBrokenKeyStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		var mu sync.Mutex
		var warned []string
		s := New(Options{Keys: brokenKeys{}, Results: w, Warn: func(msg string, args ...any) {
			mu.Lock()
			defer mu.Unlock()
			warned = append(warned, msg)
		}})
		a := w.vertex("a", 1)
		rec, _, err := (&site{t, w, s}).build(w.vertex("b", 1, in{v: a, content: true}))
		if err != nil {
			t.Fatal(err)
		}
		rec.expect(t, a, "announced; started; ran a; the result is not kept in the cache: disk is broken\n; completed")
		s.Close()
		w.check(t)
		if !slices.Contains(warned, "look up cache keys") || !slices.Contains(warned, "keep a result") {
			t.Errorf("warned of %q", warned)
		}
	})
}

// A build that nobody asks for anything, and one asked for nothing, end well.
func TestUnusedBuild(t *testing.T) {
	inSite(t, func(t *testing.T, s *site) {
		b := s.s.NewBuild(BuildOptions{})
		if _, err := b.Solve(context.Background(), Edge{}); err == nil {
			t.Error("an edge without a vertex was solved")
		}
		b.Close()
	})
}

// Neither a deep graph nor a wide one is beyond the core, whatever ends it.
func TestDeepGraphs(t *testing.T) {
	const n = 30_000
	for shape, make := range shapes {
		t.Run(shape, func(t *testing.T) {
			var deepest *Vertex
			root := make(n, func(i int, inputs ...*Vertex) *Vertex {
				v := benchVertex(i, inputs...)
				if i == 0 {
					deepest = v
				}
				return v
			})
			c := NewCore()
			var first *GetCacheMap
			for _, eff := range c.Step(&Requested{Call: 1, Edge: Edge{Vertex: root}}) {
				if eff, ok := eff.(*GetCacheMap); ok && eff.Vertex == deepest {
					first = eff
				}
			}
			c.Step(&Abandoned{Call: 1})
			c.Step(&Requested{Call: 2, Edge: Edge{Vertex: root}})
			if len(c.Vertices()) < n-3 {
				t.Errorf("%d vertices", len(c.Vertices()))
			}
			effects := c.Step(&GotCacheMap{GetCacheMap: first, Err: errStep})
			if a, ok := effects[len(effects)-1].(*Answer); !ok || !errors.Is(a.Err, errStep) {
				t.Errorf("the last effect is %v", effects[len(effects)-1])
			}
		})
	}
}

// Who joined a flight because its inputs have the same content, in records of
// its own, doesn't pay for the loss of those that the flight works with.
func TestLossIsNotShared(t *testing.T) {
	inSite(t, func(t *testing.T, s *site) {
		// Two steps whose results differ, though not in what the third sees.
		one, two := s.w.vertex("one", 1), s.w.vertex("two", 1)
		ones := s.w.vertex("y", 1, in{v: s.w.vertex("x", 1, in{v: one}), selector: "b", content: true})
		twos := s.w.vertex("y", 1, in{v: s.w.vertex("x", 1, in{v: two}), selector: "b", content: true})
		g := s.gated(ones)
		twos.Op.(*step).before = ones.Op.(*step).before
		first := s.client(ones, BuildOptions{})
		<-g.entered
		second := s.client(twos, BuildOptions{})
		synctest.Wait()
		s.w.mu.Lock()
		s.w.lost["r2"] = true // what the first made of one
		s.w.mu.Unlock()
		for range 2 { // the flight that both are on, then the next
			g.leave <- nil
			synctest.Wait()
		}
		for _, c := range []*client{first, second} {
			if err := <-c.err; err != nil {
				t.Error(err)
			}
			c.b.Close()
			c.cancel()
		}
		if got, want := describe(s.w.executions()), "1 one()\n1 two()\n1 x(two/0()two/0)\n1 y(x/0)\n2 x(one/0()one/0)"; got != want {
			t.Errorf("executed:\n%s\nwant:\n%s", got, want)
		}
	})
}

// observed writes down what an Observer is told.
type observed struct {
	Unobserved
	mu    sync.Mutex // guards lines
	lines []string
}

func (o *observed) add(format string, args ...any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.lines = append(o.lines, fmt.Sprintf(format, args...))
}

func (o *observed) Announced(e *Announce) { o.add("announced %s", e.Vertex.Name) }
func (o *observed) Loading(e *Load) {
	o.add("loading %s inputs=%d", e.Edge.Vertex.Name, len(e.Lookup.Inputs))
}
func (o *observed) Dropped(e *Drop) { o.add("dropped %d", len(e.Records)) }
func (o *observed) Starts(e *Execute, scope progress.Scope) {
	for _, in := range e.Inputs {
		in.Clone().Release() // valid
	}
	o.add("starts %s", e.Vertex.Name)
	scope.Write(progress.Event{Log: &progress.Log{Data: []byte("observed " + e.Vertex.Name)}})
}
func (o *observed) Ended(e *Execute, ev *Executed) {
	o.add("ended %s outputs=%d cached=%v failed=%v", e.Vertex.Name, len(ev.Outputs), ev.Cached, ev.Err != nil)
}

func TestObserverSeesWhatBecomesOfVertices(t *testing.T) {
	inSite(t, func(t *testing.T, s *site) {
		a := s.w.vertex("a", 1)
		b := s.w.vertex("b", 1, in{v: a})
		run := func(want ...string) *recorder {
			t.Helper()
			o, rec := &observed{}, &recorder{}
			build := s.s.NewBuild(BuildOptions{Observers: []Observer{o}, Progress: rec})
			r, err := build.Solve(context.Background(), Edge{Vertex: b})
			if err != nil {
				t.Fatal(err)
			}
			r.Release()
			build.Close()
			if !slices.Equal(o.lines, want) {
				t.Errorf("observed %q\nwant %q", o.lines, want)
			}
			return rec
		}
		rec := run("announced a", "announced b", "starts a", "ended a outputs=1 cached=false failed=false",
			"starts b", "ended b outputs=1 cached=false failed=false")
		rec.expect(t, b, "announced; started; observed b; ran b; completed")
		run("announced a", "announced b", "loading b inputs=1")
	})
}

// A build that is forgotten, and kept to ask how it ended, holds no vertices.
func TestForgottenBuildHoldsNoVertices(t *testing.T) {
	inSite(t, func(t *testing.T, s *site) {
		b := s.s.NewBuild(BuildOptions{})
		solve := func() weak.Pointer[Vertex] {
			v := s.w.vertex("top", 1, in{v: s.w.vertex("base", 1)})
			r, err := b.Solve(context.Background(), Edge{Vertex: v})
			if err != nil {
				t.Fatal(err)
			}
			r.Release()
			return weak.Make(v)
		}
		v := solve()
		b.Close()
		b.Forget()
		runtime.GC()
		if v.Value() != nil {
			t.Error("a vertex is held")
		}
		if n := b.Stats().Completed; n != 2 {
			t.Errorf("%d vertices were completed, want 2", n)
		}
	})
}
