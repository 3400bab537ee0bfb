//go:build e2e

package e2e

import (
	"flag"
	"fmt"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/client/llb"
)

var deepLayers = flag.Int("deep.layers", 520, "how many layers are more than the kernel's overlay stacks")

// Steps on top of more layers than the kernel's overlay can stack, one after the
// other or merged, see all of them; the next ones are in the cache.
func TestMoreLayersThanTheKernelStacks(t *testing.T) {
	d := newDaemon(t)
	n := *deepLayers
	chain, merged := llb.Image(env.base), []llb.State{llb.Image(env.base)}
	for i := range n {
		chain = chain.File(llb.Mkfile(fmt.Sprintf("/n%d", i), 0o644, []byte("chain")))
		merged = append(merged, llb.Scratch().File(llb.Mkfile(fmt.Sprintf("/n%d", i), 0o644, []byte("merge"))))
	}
	for name, st := range map[string]llb.State{"chain": chain, "merge": llb.Merge(merged)} {
		count := llb.Args([]string{"sh", "-c", "ls / | grep -c ^n[0-9] > /count; cat /n0 >> /count; rm /n1; echo changed > /n2"})
		top := st.Run(count).Root()
		got, err := tarOf(t, d.addr, top)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		files := 0
		for path := range got {
			if strings.HasPrefix(strings.TrimPrefix(path, "/"), "n") {
				files++
			}
		}
		// The image has none of its own that begin so.
		if want := n - 1; files != want {
			t.Errorf("%s: the result has %d of the files, not %d", name, files, want)
		}
		again, err := tarOf(t, d.addr, top.Run(llb.Args([]string{"cat", "/count"})).Root())
		if err != nil || len(again) != len(got) {
			t.Errorf("%s: on top there are %d files, not %d: %v", name, len(again), len(got), err)
		}
	}
	d.addsUp()
	if r := d.kiln("prune", "--all"); r.code != 0 {
		t.Errorf("prune: %s", r.stderr)
	}
}
