package build

import (
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/ops/source/registry/registrytest"
	control "github.com/moby/buildkit/api/services/control"
	"github.com/opencontainers/go-digest"
)

// importing makes to import what a build of result makes on another daemon, and
// returns the blob of its last layer.
func (to *daemon) importing(result, variant string) digest.Digest {
	to.t.Helper()
	there := &daemon{t: to.t, root: to.t.TempDir(), reg: to.reg, log: &sharedLog{}, out: "cache"}
	there.start()
	to.t.Cleanup(there.stop)
	ref := map[string]string{"ref": to.reg.Host + "/cache-" + result + ":cache", "mode": "max"}
	there.exports = []*control.CacheOptionsEntry{{Type: "registry", Attrs: ref}}
	to.imports = there.exports
	there.build(result, variant, trouble{})
	usage, err := there.worker.Cache().DiskUsage(to.t.Context(), []string{"description==" + result}, 0)
	to.must(err)
	if len(usage) != 1 {
		to.t.Fatalf("%d records of %s elsewhere", len(usage), result)
	}
	made, err := there.worker.Cache().Get(to.t.Context(), usage[0].ID)
	to.must(err)
	defer made.Release()
	layers, err := made.Layers(to.t.Context(), cache.Compression{})
	to.must(err)
	return layers[len(layers)-1].Blob.Digest
}

// misbehaviours are ways in which a registry gives a blob, wherever it is asked
// for it.
var misbehaviours = map[string]func(reg *registrytest.Registry, dgst digest.Digest, data []byte){
	"deleted": func(reg *registrytest.Registry, dgst digest.Digest, _ []byte) {
		reg.Before = forBlob(dgst, func(w http.ResponseWriter) { http.NotFound(w, nil) })
	},
	"unreachable": func(reg *registrytest.Registry, dgst digest.Digest, _ []byte) {
		reg.Before = forBlob(dgst, func(http.ResponseWriter) { panic(http.ErrAbortHandler) })
	},
	"truncated": func(reg *registrytest.Registry, dgst digest.Digest, data []byte) {
		reg.Before = forBlob(dgst, func(w http.ResponseWriter) { w.Write(data[:len(data)/2]) })
	},
	"bit flipped": func(reg *registrytest.Registry, dgst digest.Digest, data []byte) {
		data[len(data)/2] ^= 1
		reg.Before = forBlob(dgst, func(w http.ResponseWriter) { w.Write(data) })
	},
	"slow": func(reg *registrytest.Registry, dgst digest.Digest, data []byte) {
		reg.Before = forBlob(dgst, func(w http.ResponseWriter) {
			for i := range data {
				w.Write(data[i : i+1])
				w.(http.Flusher).Flush()
			}
		})
	},
}

func forBlob(dgst digest.Digest, answer func(http.ResponseWriter)) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, req *http.Request) bool {
		if req.URL.Query().Has("mount") {
			req.URL.RawQuery = "" // what is in one repository isn't in another
		}
		if req.Method != http.MethodGet || !strings.HasSuffix(req.URL.Path, "/cache-two/blobs/"+dgst.String()) && !strings.HasSuffix(req.URL.Path, "/cache-top/blobs/"+dgst.String()) {
			return false
		}
		answer(w)
		return true
	}
}

// misbehave makes the registry give the blob in that way from now on.
func (d *daemon) misbehave(how string, dgst digest.Digest) func() {
	d.t.Helper()
	resp, err := http.Get(d.reg.Server.URL + "/v2/cache-two/blobs/" + dgst.String())
	if err == nil && resp.StatusCode == http.StatusNotFound {
		resp.Body.Close()
		resp, err = http.Get(d.reg.Server.URL + "/v2/cache-top/blobs/" + dgst.String())
	}
	d.must(err)
	data, err := io.ReadAll(resp.Body)
	d.must(err)
	d.must(resp.Body.Close())
	if digest.FromBytes(data) != dgst {
		d.t.Fatalf("the registry gives %q for %s", data, dgst)
	}
	return func() {
		d.reg.Change(func() { misbehaviours[how](d.reg, dgst, slices.Clone(data)) })
	}
}

// A layer of an imported cache that is deleted, cut short, changed, or can't be
// reached, whenever that comes to light, costs the step that made it and no
// other; one that is slow to come costs nothing. compat: LLB-173, LLB-175
func TestLostImport(t *testing.T) {
	times := map[string]struct {
		imported string // step, whose layer is at fault
		result   string
		when     func(d *daemon, misbehave func()) trouble
		ran      string // besides the imported step, if it is lost
	}{
		"before load": {"two", "copy", func(_ *daemon, misbehave func()) trouble {
			misbehave()
			return trouble{}
		}, "top copy"},
		"while mounting":  {"two", "copy", func(_ *daemon, misbehave func()) trouble { return trouble{preparing: misbehave} }, "top copy"},
		"while digesting": {"top", "copy", func(_ *daemon, misbehave func()) trouble { return trouble{preparing: misbehave} }, "copy"},
		"during export":   {"top", "top", func(_ *daemon, misbehave func()) trouble { return trouble{exporting: misbehave} }, ""},
		"during GC": {"two", "copy", func(d *daemon, misbehave func()) trouble {
			return trouble{preparing: d.collecting(misbehave)}
		}, "top copy"},
	}
	for when, tt := range times {
		for how := range misbehaviours {
			t.Run(how+"/"+when, func(t *testing.T) {
				t.Parallel() // most of the time is spent before requests are repeated
				d := newDaemon(t)
				dgst := d.importing(tt.imported, "v")
				got := d.build(tt.result, "v", tt.when(d, d.misbehave(how, dgst)))
				want := map[string]int{}
				for _, name := range strings.Fields(tt.ran) {
					want[name]++
				}
				if how != "slow" {
					want[tt.imported]++
					if !strings.Contains(d.log.String(), dgst.String()) {
						t.Errorf("the log doesn't name %s:\n%s", dgst, d.log)
					}
				}
				if !maps.Equal(got.ran, want) {
					t.Errorf("executed %v, want %v\nlog:\n%s", got.ran, want, d.log)
				}
				d.compare(got)
				if again := d.build(tt.result, "v", trouble{}); len(again.ran) > 0 {
					t.Errorf("the same build again executed %v", again.ran)
				}
			})
		}
	}
}
