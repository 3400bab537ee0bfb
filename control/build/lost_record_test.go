package build

import (
	"bytes"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/worker"
)

// spoilRecord changes what the database says of the record that a step made,
// behind the back of the daemon that runs. A use that is going on is written before:
// it isn't again when it ends, and with it the record.
func (d *daemon) spoilRecord(name string, change func(old []byte) []byte) func() {
	return func() {
		d.must(d.worker.Cache().Prune(d.t.Context(), cache.PruneOptions{Filters: []string{"id==none"}}, nil))
		db := d.worker.Store()
		n := 0
		b := &store.Batch{}
		db.Scan("ref", "", func(id string, value []byte) bool {
			if !bytes.Contains(value, []byte(`"`+name+`"`)) {
				return true
			}
			n++
			if data := change(slices.Clone(value)); data != nil {
				b.Put("ref", id, data)
			} else {
				b.Delete("ref", id)
			}
			return true
		})
		if n != 1 {
			d.t.Fatalf("%d records of %s", n, name)
		}
		db.Write(b)
		d.must(db.Sync(d.t.Context()))
	}
}

// recordOf is the id of the record that a step made.
func (d *daemon) recordOf(name string) string {
	d.t.Helper()
	usage, err := d.worker.Cache().DiskUsage(d.t.Context(), []string{"description==" + name}, 0)
	d.must(err)
	if len(usage) != 1 {
		d.t.Fatalf("records of %s: %+v", name, usage)
	}
	return usage[0].ID
}

// A record that is damaged in the database while a build uses it costs that
// build nothing. The next start finds it, if nobody has written it again by
// then, and what is lost runs again. compat: LLB-173
func TestLostRecord(t *testing.T) {
	changes := map[string]func(old []byte) []byte{
		"deleted":     func([]byte) []byte { return nil },
		"truncated":   func(old []byte) []byte { return old[:len(old)/2] },
		"bit flipped": func(old []byte) []byte { old[0] ^= 1; return old },
	}
	times := map[string]func(d *daemon, spoil func()) trouble{
		"before load":     func(_ *daemon, spoil func()) trouble { spoil(); return trouble{} },
		"while mounting":  func(_ *daemon, spoil func()) trouble { return trouble{mounting: spoil} },
		"while digesting": func(_ *daemon, spoil func()) trouble { return trouble{digesting: spoil} },
		"during export":   func(_ *daemon, spoil func()) trouble { return trouble{exporting: spoil} },
		"during GC":       func(d *daemon, spoil func()) trouble { return trouble{mounting: d.collecting(spoil)} },
	}
	for when, happens := range times {
		for how, change := range changes {
			t.Run(how+"/"+when, func(t *testing.T) {
				d := newDaemon(t)
				d.build("two", "first", trouble{})
				id := d.recordOf("two")
				got := d.build("copy", "v", happens(d, d.spoilRecord("two", change)))
				if want := map[string]int{"top": 1, "copy": 1}; !maps.Equal(got.ran, want) {
					t.Errorf("executed %v, want %v\nlog:\n%s", got.ran, want, d.log)
				}
				d.compare(got)

				d.stop()
				d.log.Reset()
				d.start()
				got = d.build("copy", "v", trouble{})
				if got.ran["two"] > 0 && !strings.Contains(d.log.String(), id) {
					t.Errorf("the log doesn't name the record %s:\n%s", id, d.log)
				}
				for name := range got.ran {
					if !slices.Contains([]string{"two", "top", "copy"}, name) {
						t.Errorf("after a restart %s ran", name)
					}
				}
				d.compare(got)
				if again := d.build("copy", "v", trouble{}); len(again.ran) > 0 {
					t.Errorf("the same build again executed %v", again.ran)
				}
				d.stop()
				report, err := worker.Check(t.Context(), d.root, true)
				d.must(err)
				// A start doesn't look for keys of a record that isn't there.
				for _, problem := range report.Problems {
					if !strings.HasSuffix(problem, "its result "+id+" does not exist") {
						t.Errorf("fsck: %s", problem)
					}
				}
				if len(report.Problems) > 0 {
					_, err := worker.Repair(t.Context(), d.root, true)
					d.must(err)
					if report, err = worker.Check(t.Context(), d.root, true); err != nil || len(report.Problems) > 0 {
						t.Errorf("after a repair: %q, %v", report.Problems, err)
					}
				}
				d.start()
			})
		}
	}
}
