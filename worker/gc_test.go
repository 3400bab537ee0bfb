package worker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kilnbuild/kiln/cache"
)

// compat: DMN-090
// compat: DMN-091
// compat: DMN-092
// compat: DMN-093
// compat: DMN-094
// compat: DMN-096
// compat: DMN-097
func TestGCRules(t *testing.T) {
	easy := cache.PruneOptions{
		Filters:      []string{"type==source.local", "type==exec.cachemount", "type==source.git.checkout"},
		KeepDuration: 48 * time.Hour, MaxUsedSpace: 512e6, Rule: "gc rule#0",
	}
	byDefault := func(reserved, maxUsed, minFree int64) []cache.PruneOptions {
		caps := cache.PruneOptions{ReservedSpace: reserved, MaxUsedSpace: maxUsed, MinFreeSpace: minFree}
		old, rest, all := caps, caps, caps
		old.KeepDuration, all.All = 60*24*time.Hour, true
		old.Rule, rest.Rule, all.Rule = "gc rule#1", "gc rule#2", "gc rule#3"
		return []cache.PruneOptions{easy, old, rest, all}
	}
	const gib = 1 << 30
	for name, tc := range map[string]struct {
		gc   GC
		disk int64
		want []cache.PruneOptions
	}{
		"a big disk":      {disk: 1000 * gib, want: byDefault(10e9, 100e9, 201e9)},
		"a small disk":    {disk: 50 * gib, want: byDefault(6e9, 41e9, 11e9)},
		"a tiny disk":     {disk: gib / 2, want: byDefault(1e9, 1e9, 1e9)},
		"a share":         {gc: GC{MaxUsed: DiskSpace{Percent: 50}}, disk: 100 * gib, want: byDefault(0, 51e9, 0)},
		"only a reserve":  {gc: GC{Reserved: DiskSpace{Bytes: 7}}, disk: 100 * gib, want: byDefault(7, 0, 0)},
		"rules of a user": {gc: GC{Rules: []GCRule{{All: true, MinFree: DiskSpace{Percent: 1}}}}, disk: 100 * gib, want: []cache.PruneOptions{{All: true, MinFreeSpace: 2e9, Rule: "gc rule#0"}}},
	} {
		if got := tc.gc.rulesOn(tc.disk); !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%s:\ngot  %+v\nwant %+v", name, got, tc.want)
		}
	}
	if got, err := (GC{Off: true}).rules(t.TempDir()); got != nil || err != nil {
		t.Errorf("off: %+v, %v", got, err)
	}
	if _, err := (GC{}).rules("/does/not/exist"); err == nil {
		t.Error("no error for a root that isn't there")
	}
}

// passes counts what a collector does, in a bubble of fake time.
type passes struct {
	mu    sync.Mutex
	began []time.Duration // since the start
}

func (p *passes) since(start time.Time, take time.Duration, err error) func(context.Context) error {
	return func(ctx context.Context) error {
		p.mu.Lock()
		p.began = append(p.began, time.Since(start))
		p.mu.Unlock()
		pause(ctx, take)
		return err
	}
}

func (p *passes) list() []time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.began)
}

// A pass comes soon after a nudge, many nudges make one, and pauses grow with
// what a pass takes.
func TestCollectorPaces(t *testing.T) {
	for name, tc := range map[string]struct {
		take time.Duration
		want []time.Duration
	}{
		"quick": {0, []time.Duration{time.Second, 12 * time.Second, 23 * time.Second}},
		// After a pass of 2 s come 100 s without.
		"slow": {2 * time.Second, []time.Duration{time.Second, 104 * time.Second, 207 * time.Second}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var p passes
				c := newCollector(slog.New(slog.DiscardHandler))
				start := time.Now()
				c.start(p.since(start, tc.take, nil))
				for time.Since(start) < tc.want[2]+tc.take+time.Millisecond {
					c.nudge()
					pause(t.Context(), 100*time.Millisecond)
				}
				if got := p.list(); !slices.Equal(got, tc.want) {
					t.Errorf("passes at %v, want %v", got, tc.want)
				}
				c.close()
			})
		})
	}
}

// Without a nudge there is no pass but the first, an error is logged, and
// closing ends a pass that is under way.
func TestCollectorEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var p passes
		var log bytes.Buffer
		c := newCollector(slog.New(slog.NewTextHandler(&log, nil)))
		c.start(p.since(time.Now(), 0, errors.New("boom")))
		pause(t.Context(), time.Hour)
		if got := p.list(); len(got) != 1 {
			t.Errorf("passes at %v", got)
		}
		c.close()
		if !strings.Contains(log.String(), "boom") {
			t.Errorf("log %q", log.String())
		}
	})
	synctest.Test(t, func(t *testing.T) {
		var p passes
		var log bytes.Buffer
		c := newCollector(slog.New(slog.NewTextHandler(&log, nil)))
		start := time.Now()
		c.start(p.since(start, time.Hour, errClosing))
		pause(t.Context(), 2*time.Second)
		c.close()
		if time.Since(start) != 2*time.Second || log.Len() > 0 {
			t.Errorf("closed after %s, log %q", time.Since(start), log.String())
		}
	})
}

// A worker evicts by its rules, in the background, and says so; what is in use
// stays.
func TestWorkerCollects(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	var mu sync.Mutex
	var log bytes.Buffer
	w, err := New(t.Context(), Config{
		Root: root, GC: GC{Rules: []GCRule{{Filters: []string{"description~=never"}}, {MaxUsed: DiskSpace{Bytes: 300 << 10}}}},
		Log: slog.New(slog.NewTextHandler(writerFunc(func(p []byte) (int, error) {
			mu.Lock()
			defer mu.Unlock()
			return log.Write(p)
		}), nil)),
	})
	must(t, err)
	var held []*cache.Ref
	for i := range 6 {
		ref := record(t, w, fmt.Sprintf("record %d", i), 100<<10)
		if i%3 == 0 {
			held = append(held, ref)
		} else {
			ref.Release()
		}
	}
	must(t, w.collect(t.Context()))
	usage, err := w.Cache().DiskUsage(t.Context(), nil, 0)
	must(t, err)
	total := int64(0)
	for _, u := range usage {
		total += u.Size
	}
	if total > 300<<10 || len(usage) < 2 {
		t.Errorf("%d bytes are left in %+v", total, usage)
	}
	evicted := 0
	w.Cache().Evictions(func(e cache.Eviction) bool {
		evicted++
		if e.Rule != "gc rule#1" {
			t.Errorf("%+v", e)
		}
		return true
	})
	if evicted != 6-len(usage) {
		t.Errorf("%d evictions are remembered, %d records went", evicted, 6-len(usage))
	}
	for _, ref := range held {
		ref.Release()
	}
	must(t, w.Close())
	for _, want := range []string{"evicted cache record", `rule="gc rule#1"`, "description=\"record", "size=", "collected garbage"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log lacks %q:\n%s", want, log.String())
		}
	}
	logged := 0 // by this pass, and by one of the worker's own if that took long
	for _, m := range regexp.MustCompile(` records=(\d+)`).FindAllStringSubmatch(log.String(), -1) {
		n, err := strconv.Atoi(m[1])
		must(t, err)
		logged += n
	}
	if logged != evicted {
		t.Errorf("%d records are logged to be collected, %d went:\n%s", logged, evicted, log.String())
	}
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
