// Package metrics counts, and writes the counts in the text format of
// Prometheus (version 0.0.4). It is the part of a client library that a daemon
// needs: counters, histograms, and values that are read when they are asked for.
//
// A Set holds families; a family is a name with a value for each combination of
// its labels. Without labels it is there from the start, with labels once it was
// set: add 0 to have it earlier. All methods are safe for concurrent use.
package metrics

import (
	"cmp"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// ContentType is that of what WriteTo writes.
const ContentType = "text/plain; version=0.0.4; charset=utf-8"

// Kind is what a family's values mean.
type Kind string

// The kinds of values that are read when asked for.
const (
	CounterKind Kind = "counter" // only grows
	GaugeKind   Kind = "gauge"
)

// Set is a number of families. The zero value is empty.
type Set struct {
	mu       sync.Mutex // guards families
	families []*family
}

type family struct {
	name, help string
	kind       Kind
	labels     []string
	write      func(*writer)
}

// add registers f; a name is used once.
func (s *Set) add(f *family) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, taken := slices.BinarySearchFunc(s.families, f.name, func(f *family, name string) int { return cmp.Compare(f.name, name) })
	if taken {
		panic("internal error: two metrics are named " + f.name)
	}
	s.families = slices.Insert(s.families, i, f)
}

// Counter only grows.
type Counter struct {
	family
	mu     sync.Mutex // guards values
	values map[string]float64
}

// Counter returns a new counter of s. By custom its name ends with _total.
func (s *Set) Counter(name, help string, labels ...string) *Counter {
	c := &Counter{values: map[string]float64{}}
	c.family = family{name: name, help: help, kind: CounterKind, labels: labels, write: c.writeTo}
	if len(labels) == 0 {
		c.Add(0)
	}
	s.add(&c.family)
	return c
}

// Add adds n, which isn't negative, to the value with these label values.
func (c *Counter) Add(n float64, values ...string) {
	key := c.join(values)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.values[key] += n
}

func (c *Counter) writeTo(w *writer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, key := range sorted(c.values) {
		w.sample(c.name, key, c.values[key])
	}
}

// Histogram counts values by size.
type Histogram struct {
	family
	bounds []float64
	mu     sync.Mutex // guards values
	values map[string]*distribution
}

type distribution struct {
	counts []uint64 // of each bucket alone; the last has no bound
	sum    float64
}

// Histogram returns a new histogram of s, whose buckets have the given upper
// bounds, which rise.
func (s *Set) Histogram(name, help string, bounds []float64, labels ...string) *Histogram {
	h := &Histogram{bounds: bounds, values: map[string]*distribution{}}
	h.family = family{name: name, help: help, kind: "histogram", labels: labels, write: h.writeTo}
	if len(labels) == 0 {
		h.of("")
	}
	s.add(&h.family)
	return h
}

// Observe counts v.
func (h *Histogram) Observe(v float64, values ...string) {
	key := h.join(values)
	i, _ := slices.BinarySearch(h.bounds, v) // a value at a bound is below it
	h.mu.Lock()
	defer h.mu.Unlock()
	d := h.of(key)
	d.counts[i]++
	d.sum += v
}

func (h *Histogram) of(key string) *distribution {
	d := h.values[key]
	if d == nil {
		d = &distribution{counts: make([]uint64, len(h.bounds)+1)}
		h.values[key] = d
	}
	return d
}

func (h *Histogram) writeTo(w *writer) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, key := range sorted(h.values) {
		d := h.values[key]
		total := uint64(0)
		for i, n := range d.counts {
			total += n
			bound := math.Inf(1)
			if i < len(h.bounds) {
				bound = h.bounds[i]
			}
			w.sample(h.name+"_bucket", comma(key)+`le="`+number(bound)+`"`, float64(total))
		}
		w.sample(h.name+"_sum", key, d.sum)
		w.sample(h.name+"_count", key, float64(total))
	}
}

// Func adds a family whose values fn emits when they are asked for.
func (s *Set) Func(kind Kind, name, help string, labels []string, fn func(emit func(v float64, values ...string))) {
	f := &family{name: name, help: help, kind: kind, labels: labels}
	f.write = func(w *writer) {
		fn(func(v float64, values ...string) { w.sample(name, f.join(values), v) })
	}
	s.add(f)
}

// join makes label values what stands between the braces.
func (f *family) join(values []string) string {
	if len(values) != len(f.labels) {
		panic(fmt.Sprintf("internal error: metric %s has %d labels, was given %q", f.name, len(f.labels), values))
	}
	var b strings.Builder
	for i, v := range values {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(f.labels[i] + `="` + escape(v) + `"`)
	}
	return b.String()
}

var (
	labelEscaper = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)
	helpEscaper  = strings.NewReplacer(`\`, `\\`, "\n", `\n`)
)

func escape(value string) string { return labelEscaper.Replace(strings.ToValidUTF8(value, "\uFFFD")) }

func comma(labels string) string {
	if labels == "" {
		return ""
	}
	return labels + ","
}

func sorted[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// number is v as the format has it.
func number(v float64) string {
	switch {
	case math.IsInf(v, 1):
		return "+Inf"
	case math.IsInf(v, -1):
		return "-Inf"
	}
	return strconv.FormatFloat(v, 'g', -1, 64)
}

// writer counts what it writes and keeps the first error.
type writer struct {
	w   io.Writer
	n   int64
	err error
}

func (w *writer) print(text string) {
	if w.err != nil {
		return
	}
	n, err := io.WriteString(w.w, text)
	w.n += int64(n)
	w.err = err
}

func (w *writer) sample(name, labels string, v float64) {
	if labels != "" {
		name += "{" + labels + "}"
	}
	w.print(name + " " + number(v) + "\n")
}

// WriteTo writes all values, by name.
func (s *Set) WriteTo(to io.Writer) (int64, error) {
	s.mu.Lock()
	families := slices.Clone(s.families)
	s.mu.Unlock()
	w := &writer{w: to}
	for _, f := range families {
		w.print("# HELP " + f.name + " " + helpEscaper.Replace(f.help) + "\n# TYPE " + f.name + " " + string(f.kind) + "\n")
		f.write(w)
	}
	return w.n, w.err
}
