package cache

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/snapshot"
)

// onRemove calls then before a snapshot is removed.
type onRemove struct {
	snapshot.Snapshotter
	then func()
}

func (o *onRemove) Remove(b *store.Batch, id string) error {
	o.then()
	return o.Snapshotter.Remove(b, id)
}

// Whatever is damaged, before a collection or under it: it goes through, what is
// in use stays as it is, and nothing is left of what went.
func TestCollectOverDamage(t *testing.T) {
	put := func(e *env, bucket, key string) {
		b := &store.Batch{}
		b.Put(bucket, key, []byte("{"))
		e.db.Write(b)
	}
	type victim struct{ id, snap, blob string }
	for name, damage := range map[string]func(e *env, v victim){
		"snapshot gone":     func(e *env, v victim) { must(e.t, os.RemoveAll(filepath.Join(e.root, "snapshots", v.snap))) },
		"layer gone":        func(e *env, v victim) { must(e.t, os.RemoveAll(filepath.Join(e.root, "snapshots", v.snap, "fs"))) },
		"blob truncated":    func(e *env, v victim) { must(e.t, os.Truncate(v.blob, 1)) },
		"blob gone":         func(e *env, v victim) { must(e.t, os.Remove(v.blob)) },
		"record damaged":    func(e *env, v victim) { put(e, bucketRecords, v.id) },
		"snapshot's record": func(e *env, v victim) { put(e, "snapshot", v.snap) },
		"blob's record":     func(e *env, v victim) { put(e, "blob", "sha256:"+filepath.Base(v.blob)) },
	} {
		for _, during := range []bool{false, true} {
			for _, limit := range []int64{0, 1} { // all goes, or as much as is too much
				t.Run(fmt.Sprintf("%s/during=%t/limit=%d", name, during, limit), func(t *testing.T) {
					e := newEnv(t)
					held := e.layer(nil, Options{Description: "held"}, "held=1")
					e.persist(held)
					src := newSource()
					r := e.pull(src, src.add(t, "gzip", tarOf(t, "a=1")), src.add(t, "gzip", tarOf(t, "b=2")))
					must(t, r.Extract(t.Context()))
					e.persist(r)
					below := r.Parent()
					record := below.r
					v := victim{record.id, record.snap, filepath.Join(e.root, "blobs", "sha256", record.blobs[0].desc.Digest.Encoded())}
					below.Release()
					r.Release()
					must(t, e.db.Sync(t.Context()))
					told := 0
					if during { // planned, and the record on top of it is going
						e.m.snapshots = &onRemove{e.snaps, sync.OnceFunc(func() { damage(e, v) })}
					} else {
						damage(e, v)
					}
					must(t, e.m.Prune(t.Context(), PruneOptions{MaxUsedSpace: limit}, func(Usage) error {
						told++
						return nil
					}))
					if told != 2 {
						t.Errorf("%d records went", told)
					}
					e.wantFiles(held, "held=1")
					must(t, e.m.removed(t.Context()))
					held.Release()
					e.prune(PruneOptions{All: true})
					e.cleared()
					for _, path := range []string{v.blob, filepath.Join(e.root, "snapshots", v.snap)} {
						if _, err := os.Lstat(path); !os.IsNotExist(err) {
							t.Errorf("%s is left: %v", path, err)
						}
					}
					e.empty()
					e.restart()
					e.empty()
				})
			}
		}
	}
}
