//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"sync"
	"testing"
)

// mounts is a project whose steps write into a cache mount of each kind. Those
// that have one for themselves fail if somebody else is in it.
const mounts = `FROM BASE AS seed
RUN mkdir /seed && echo seed > /seed/s
FROM BASE AS shared
RUN --mount=type=cache,id=shared,target=/c,from=seed,source=/seed grep seed /c/s && echo SALT >> /c/n
FROM BASE AS locked
RUN --mount=type=cache,id=locked,sharing=locked,target=/c mkdir /c/busy && echo $(($(cat /c/n || echo 0) + 1)) > /c/m && mv /c/m /c/n && rmdir /c/busy; echo SALT
FROM BASE AS private
RUN --mount=type=cache,id=private,sharing=private,target=/c mkdir /c/busy && echo SALT >> /c/n && rmdir /c/busy
FROM scratch
COPY --from=shared /etc/passwd /1
COPY --from=locked /etc/passwd /2
COPY --from=private /etc/passwd /3
`

// mounted is one that reads what they wrote. A mount on a base is another one than
// the one of the same id without.
const mounted = `FROM BASE AS seed
RUN mkdir /seed && echo seed > /seed/s
FROM BASE AS b
RUN --mount=type=cache,id=shared,target=/shared,from=seed,source=/seed,readonly --mount=type=cache,id=locked,sharing=locked,target=/locked,readonly \
	sort -u /shared/n | wc -l > /out && cat /locked/n /shared/s >> /out; echo SALT
FROM scratch
COPY --from=b /out /out
`

// Many builds at once write into the same cache mounts: all into a shared one, one
// after the other into a locked one, each into a private one of its own. None
// loses what another has written, or finds the mount empty, also after a crash.
// compat: LLB-044, LLB-045
func TestCacheMountsInParallel(t *testing.T) {
	const builds = 20
	d := newDaemon(t)
	var wg sync.WaitGroup
	for i := range builds {
		wg.Go(func() {
			if r := d.dockerfile(strings.ReplaceAll(mounts, "SALT", fmt.Sprint("build ", i)), nil); r.code != 0 {
				t.Errorf("build %d:\n%s", i, r.stderr)
			}
		})
	}
	wg.Wait()
	want := fmt.Sprintf("%d\n%d\nseed\n", builds, builds)
	for _, when := range []string{"at once", "after a crash"} {
		if got := readFile(t, d.local(strings.ReplaceAll(mounted, "SALT", when), nil), "out"); got != want {
			t.Errorf("%s the mounts have %q, want %q", when, got, want)
		}
		d.kill()
		d.start()
	}
}
