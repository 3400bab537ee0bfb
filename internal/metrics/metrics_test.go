package metrics

import (
	"errors"
	"math"
	"strings"
	"sync"
	"testing"
)

func TestText(t *testing.T) {
	var s Set
	c := s.Counter("b_total", "counts\nthings \\ more")
	l := s.Counter("c_total", "by kind", "kind", "code")
	h := s.Histogram("d_seconds", "durations", []float64{0.5, 1}, "status")
	plain := s.Histogram("e_seconds", "none yet", []float64{1})
	s.Func(GaugeKind, "a_bytes", "read when asked for", []string{"type"}, func(emit func(float64, ...string)) {
		emit(1.5e12, "x")
		emit(math.Inf(-1), "y")
	})
	c.Add(1)
	c.Add(2)
	l.Add(1, "quote \" back \\ line \n bad \xff", "1")
	l.Add(0, "a", "0")
	for _, v := range []float64{0.1, 0.5, 0.7, 2} {
		h.Observe(v, "ok")
	}
	_ = plain
	var b strings.Builder
	n, err := s.WriteTo(&b)
	if err != nil || n != int64(b.Len()) {
		t.Fatalf("wrote %d of %d bytes: %v", n, b.Len(), err)
	}
	const want = `# HELP a_bytes read when asked for
# TYPE a_bytes gauge
a_bytes{type="x"} 1.5e+12
a_bytes{type="y"} -Inf
# HELP b_total counts\nthings \\ more
# TYPE b_total counter
b_total 3
# HELP c_total by kind
# TYPE c_total counter
c_total{kind="a",code="0"} 0
c_total{kind="quote \" back \\ line \n bad ` + "\uFFFD" + `",code="1"} 1
# HELP d_seconds durations
# TYPE d_seconds histogram
d_seconds_bucket{status="ok",le="0.5"} 2
d_seconds_bucket{status="ok",le="1"} 3
d_seconds_bucket{status="ok",le="+Inf"} 4
d_seconds_sum{status="ok"} 3.3
d_seconds_count{status="ok"} 4
# HELP e_seconds none yet
# TYPE e_seconds histogram
e_seconds_bucket{le="1"} 0
e_seconds_bucket{le="+Inf"} 0
e_seconds_sum 0
e_seconds_count 0
`
	if b.String() != want {
		t.Errorf("got:\n%s\nwant:\n%s", b.String(), want)
	}
}

func TestMisuse(t *testing.T) {
	var s Set
	c := s.Counter("a_total", "", "kind")
	for name, fn := range map[string]func(){
		"a name twice":   func() { s.Counter("a_total", "") },
		"a label less":   func() { c.Add(1) },
		"a label more":   func() { c.Add(1, "a", "b") },
		"in a histogram": func() { s.Histogram("h", "", nil).Observe(1, "x") },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: no panic", name)
				}
			}()
			fn()
		}()
	}
}

type full struct{ left int }

var errFull = errors.New("no space left")

func (f *full) Write(p []byte) (int, error) {
	if f.left--; f.left < 0 {
		return 0, errFull
	}
	return len(p), nil
}

func TestWriteErrorsAndRaces(t *testing.T) {
	var s Set
	c, h := s.Counter("a_total", "", "k"), s.Histogram("b", "", []float64{1})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 100 {
				c.Add(1, "x")
				h.Observe(2)
				if _, err := s.WriteTo(&full{left: 1}); !errors.Is(err, errFull) {
					t.Errorf("error %v", err)
				}
			}
		})
	}
	wg.Wait()
	var b strings.Builder
	if _, err := s.WriteTo(&b); err != nil || !strings.Contains(b.String(), `a_total{k="x"} 400`) || !strings.Contains(b.String(), "b_count 400") {
		t.Errorf("%v:\n%s", err, b.String())
	}
}
