package cache

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/snapshot"
)

// onMeasure calls a function before each measurement.
type onMeasure struct {
	snapshot.Snapshotter
	fn func(id string)
}

func (s onMeasure) Usage(ctx context.Context, id string) (snapshot.Usage, error) {
	s.fn(id)
	return s.Snapshotter.Usage(ctx, id)
}

// While the kernel writes a file to the disk, its size may be off. So a size is
// remembered only if it was measured when the files were there.
func TestSizesAreMeasuredOnDisk(t *testing.T) {
	e := &env{t: t, root: t.TempDir(), delay: time.Hour} // no commit but those waited for
	e.open()
	t.Cleanup(e.close)
	early := e.layer(nil, Options{}, "early=1")
	if du := get(e.m.DiskUsage(t.Context(), nil, 0))(t); len(du) != 1 || du[0].Size == 0 {
		t.Errorf("before it is stored: %+v", du)
	}
	late := e.layer(nil, Options{}, "late=1")
	b := &store.Batch{}
	must(t, early.Persist(b))
	must(t, late.Persist(b))
	e.db.Write(b)

	var mu sync.Mutex
	measured := map[string]bool{}
	e.m.snapshots = onMeasure{e.snaps, func(id string) {
		mu.Lock()
		defer mu.Unlock()
		measured[id] = true
		for _, ref := range []*Ref{early, late} {
			if ref.r.isPersisting(e.m) {
				t.Errorf("%s is measured while %s is on its way to the disk", id, ref.ID())
			}
		}
	}}
	get(e.m.DiskUsage(t.Context(), nil, 0))(t)
	for _, ref := range []*Ref{early, late} {
		if snap := e.m.snapOf(ref.r); !measured[snap] {
			t.Errorf("%s wasn't measured once it was on the disk", snap)
		}
	}
	clear(measured)
	get(e.m.DiskUsage(t.Context(), nil, 0))(t)
	if len(measured) > 0 {
		t.Errorf("measured again: %v", measured)
	}
	e.m.snapshots = e.snaps
	early.Release()
	late.Release()
}
