package cache

import (
	"fmt"
	"testing"

	"github.com/kilnbuild/kiln/internal/store"
)

const benchRecords = 5200

// filled returns a cache with many persisted, unused records.
func filled(b *testing.B) *env {
	e := newEnv(b)
	e.fill(benchRecords)
	return e
}

func (e *env) fill(n int) {
	e.t.Helper()
	base := e.layer(nil, Options{Description: "base"}, "base=0")
	for i := range n / 100 {
		batch := &store.Batch{}
		for j := range 100 {
			u := get(e.m.New(e.t.Context(), base, Options{Description: fmt.Sprintf("mkfile /%d/%d", i, j)}))(e.t)
			r := get(u.Commit(e.t.Context()))(e.t)
			must(e.t, r.Persist(batch))
			defer r.Release()
		}
		e.db.Write(batch)
	}
	base.Release()
}

func BenchmarkOpen(b *testing.B) {
	e := filled(b)
	must(b, e.m.Close())
	must(b, e.db.Sync(b.Context()))
	cfg := Config{Store: e.db, Snapshots: e.snaps, Blobs: e.blobs, Root: e.root}
	for b.Loop() {
		m, err := Open(b.Context(), cfg)
		must(b, err)
		e.m = m
	}
}

func BenchmarkDiskUsage(b *testing.B) {
	e := filled(b)
	for b.Loop() {
		get(e.m.DiskUsage(b.Context(), nil, 0))(b)
	}
}

func BenchmarkDiskUsageFirst(b *testing.B) {
	e := filled(b)
	for b.Loop() {
		e.m.mu.Lock()
		for _, r := range e.m.records {
			r.snapSize = sizeUnknown
		}
		e.m.mu.Unlock()
		get(e.m.DiskUsage(b.Context(), nil, 0))(b)
	}
}

func BenchmarkPruneAll(b *testing.B) {
	e := newEnv(b)
	for b.Loop() {
		b.StopTimer()
		e.fill(benchRecords)
		b.StartTimer()
		must(b, e.m.Prune(b.Context(), PruneOptions{All: true}, nil))
	}
}

func BenchmarkNewCommitPersistRelease(b *testing.B) {
	e := newEnv(b)
	base := e.layer(nil, Options{}, "base=0")
	defer base.Release()
	for b.Loop() {
		u := get(e.m.New(b.Context(), base, Options{Description: "x"}))(b)
		r := get(u.Commit(b.Context()))(b)
		e.persist(r)
		r.Release()
	}
}

// BenchmarkExtract pulls six gzip layers of 16 MB in 500 files each.
func BenchmarkExtract(b *testing.B) {
	src := newSource()
	content := string(sample(32 << 10))
	var layers []Layer
	for i := range 6 {
		var files []string
		for j := range 500 {
			files = append(files, fmt.Sprintf("l%d/f%d=%s", i, j, content))
		}
		layers = append(layers, src.add(b, "gzip", tarOf(b, files...)))
	}
	for b.Loop() {
		e := newEnv(b)
		r := e.pull(src, layers...)
		must(b, r.Extract(b.Context()))
		r.Release()
	}
	b.SetBytes(6 * 500 * 32 << 10)
}

// BenchmarkLayers packs a layer of 64 MB.
func BenchmarkLayers(b *testing.B) {
	for _, kind := range []string{"gzip", "zstd", "uncompressed"} {
		b.Run(kind, func(b *testing.B) {
			e := newEnv(b)
			var files []string
			for j := range 64 {
				files = append(files, fmt.Sprintf("f%d=%s", j, sample(1<<20)))
			}
			b.SetBytes(64 << 20)
			for b.Loop() {
				b.StopTimer()
				r := e.layer(nil, Options{}, files...)
				b.StartTimer()
				get(r.Layers(b.Context(), Compression{Type: kind}))(b)
				b.StopTimer()
				r.Release()
				b.StartTimer()
			}
		})
	}
}

func BenchmarkGetRelease(b *testing.B) {
	e := newEnv(b)
	r := e.layer(nil, Options{}, "base=0")
	e.persist(r)
	id := r.ID()
	r.Release()
	for b.Loop() {
		get(e.m.Get(b.Context(), id))(b).Release()
	}
}
