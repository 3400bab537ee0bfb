package monitor

import (
	"bytes"
	"encoding/json"
	"expvar"
	"fmt"
	"net/http"
	"net/http/pprof"
	"runtime"
	"runtime/trace"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/internal/metrics"
)

// Handler serves the debug pages (DMN-114). What they show of the past begins
// with the first call.
func (m *Monitor) Handler() http.Handler {
	m.recent.on.Store(true)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /debug/requests", m.requests)
	mux.HandleFunc("GET /debug/events", m.recent.page(events))
	mux.HandleFunc("GET /debug/cache/all", m.recent.page(lookups, stores, loads))
	mux.HandleFunc("GET /debug/cache/lookup", m.recent.page(lookups))
	mux.HandleFunc("GET /debug/cache/store", m.recent.page(stores))
	mux.HandleFunc("GET /debug/cache/load", m.recent.page(loads))
	mux.HandleFunc("GET /metrics", m.metrics)
	mux.Handle("GET /debug/vars", expvar.Handler())
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	mux.HandleFunc("/debug/gc", func(http.ResponseWriter, *http.Request) { runtime.GC() })
	mux.HandleFunc("GET /debug/cache/verify", m.verify)
	f := &flight{}
	mux.HandleFunc("POST /debug/flight/trace/start", f.start)
	mux.HandleFunc("POST /debug/flight/trace/stop", f.stop)
	mux.HandleFunc("POST /debug/flight/trace/set_period", f.setPeriod)
	mux.HandleFunc("GET /debug/flight/trace", f.fetch)
	return mux
}

func (m *Monitor) metrics(w http.ResponseWriter, _ *http.Request) {
	var text bytes.Buffer
	m.write(&text)
	w.Header().Set("Content-Type", metrics.ContentType)
	_, _ = w.Write(text.Bytes()) // an error is the reader's, who has left
}

// write writes all values into memory: whoever reads slowly holds up nobody.
func (m *Monitor) write(text *bytes.Buffer) {
	m.scrape.Lock()
	defer m.scrape.Unlock()
	m.totals = m.cfg.Cache.Totals()
	_, _ = m.set.WriteTo(text) // a buffer takes everything
}

// verify shows what the verifier has found.
func (m *Monitor) verify(w http.ResponseWriter, _ *http.Request) {
	if m.cfg.Verify == nil {
		http.Error(w, "the cache isn't verified; start the daemon with --cache-verify=0.1 to verify a tenth of the hits", http.StatusNotFound)
		return
	}
	text, err := json.MarshalIndent(m.cfg.Verify.Summary(), "", "  ")
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(append(text, '\n')) // as above
}

// flight records the last moments of the runtime's execution trace.
type flight struct {
	mu       sync.Mutex // guards the fields below
	recorder *trace.FlightRecorder
	period   time.Duration
}

func (f *flight) start(w http.ResponseWriter, _ *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.recorder != nil {
		http.Error(w, "flight recorder is already running", http.StatusConflict)
		return
	}
	r := trace.NewFlightRecorder(trace.FlightRecorderConfig{MinAge: f.period})
	if err := r.Start(); err != nil {
		http.Error(w, fmt.Sprintf("could not start flight recorder: %s", err), http.StatusInternalServerError)
		return
	}
	f.recorder = r
}

func (f *flight) stop(w http.ResponseWriter, _ *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.recorder == nil {
		http.Error(w, "flight recorder is not running", http.StatusConflict)
		return
	}
	f.recorder.Stop()
	f.recorder = nil
}

func (f *flight) setPeriod(w http.ResponseWriter, req *http.Request) {
	period, err := time.ParseDuration(req.FormValue("period"))
	if err != nil || period <= 0 {
		http.Error(w, fmt.Sprintf("period %q: must be a duration such as 10s", req.FormValue("period")), http.StatusBadRequest)
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.recorder != nil {
		http.Error(w, "flight recorder is running, stop it to change its period", http.StatusPreconditionFailed)
		return
	}
	f.period = period
}

func (f *flight) fetch(w http.ResponseWriter, _ *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.recorder == nil {
		http.Error(w, "flight recorder is not running", http.StatusConflict)
		return
	}
	var data bytes.Buffer
	if _, err := f.recorder.WriteTo(&data); err != nil {
		http.Error(w, fmt.Sprintf("could not write in-flight trace: %s", err), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Disposition", `attachment; filename="trace"`)
	_, _ = w.Write(data.Bytes()) // an error is the reader's, who has left
}
