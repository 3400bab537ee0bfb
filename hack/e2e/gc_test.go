//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/docker/go-units"
	"github.com/kilnbuild/kiln/hack/harness"
	"golang.org/x/sys/unix"
)

// big builds an image with a file of some MB that no other build has.
func (d *daemon) big(name string, mb int) result {
	return d.dockerfile(fmt.Sprintf("FROM %s\nRUN dd if=/dev/zero of=/big bs=1048576 count=%d && echo %s > /name\n", env.base, mb, name), nil)
}

// total is the last line of du.
func (d *daemon) total() (int64, error) {
	r := d.buildctl("du")
	last := strings.Fields(r.stdout[strings.LastIndex(r.stdout, "Total:"):])
	return units.FromHumanSize(last[1])
}

// compat: CTL-047
// compat: CTL-109
// compat: DMN-044
func TestGarbageCollection(t *testing.T) {
	d := newDaemonWithConfig(t, "[[worker.oci.gcpolicy]]\nall = true\nmaxUsedSpace = '24MB'\n")
	const most = 24 << 20
	if r := d.buildctl("debug", "workers", "-v").must(t); !strings.Contains(r.stdout, "GC Policy rule#0") || !strings.Contains(r.stdout, "25.165824MB") || strings.Contains(r.stdout, "rule#1") {
		t.Errorf("rules:\n%s", r.stdout)
	}
	for i := range 4 {
		d.big(strconv.Itoa(i), 9).must(t)
	}
	if err := harness.WaitFor(harness.Patience, func() error {
		if n, err := d.total(); err != nil || n > most {
			return fmt.Errorf("the cache has %d bytes: %v", n, err)
		}
		for _, want := range []string{`msg="evicted cache record"`, `rule="gc rule#0"`, `msg="collected garbage"`} {
			if !strings.Contains(d.log.String(), want) {
				return fmt.Errorf("the log lacks %s", want)
			}
		}
		return nil
	}); err != nil {
		t.Errorf("%v\n%s", err, d.log)
	}
	d.big("0", 9).must(t) // evicted or not
}

// compat: DMN-096
func TestNoGarbageCollection(t *testing.T) {
	d := newDaemon(t, "--oci-worker-gc=false")
	if r := d.buildctl("debug", "workers", "-v").must(t); strings.Contains(r.stdout, "GC Policy") {
		t.Errorf("rules:\n%s", r.stdout)
	}
}

// du adds up to what the state directory holds, also after the daemon was
// killed in the middle of builds.
func TestUsageAddsUpToTheDisk(t *testing.T) {
	d := newDaemon(t, "--oci-worker-gc=false")
	for _, args := range [][]string{{"fsck"}, {"fsck", "--repair"}} { // while it runs
		out, err := kilndCommand(append(args, "--root", d.root)...).CombinedOutput()
		if err == nil || !strings.Contains(string(out), "in use by another daemon, which has to end first") {
			t.Errorf("%q: %v: %s", args, err, out)
		}
	}
	d.big("one", 5).must(t)
	d.local("FROM scratch\nCOPY . /\n", files{"a": strings.Repeat("a", 100000), "d/b": "b"})
	d.addsUp()
	done := make(chan result, 1)
	go func() { done <- d.big("two", 50) }()
	if err := harness.WaitFor(harness.Patience, func() error {
		if r := d.buildctl("du", "--filter", "inuse"); !strings.Contains(r.stdout, "false") && len(done) == 0 {
			return fmt.Errorf("nothing is in use, and the build goes on:\n%s", r.stdout)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	d.kill()
	<-done
	d.start()
	d.addsUp()
	d.buildctl("prune", "--all").must(t)
	d.addsUp()
}

// A cache mount can be emptied by its id, which Dockerfiles give a slash.
func TestPruneOfACacheMount(t *testing.T) {
	d := newDaemon(t)
	const count = "RUN --mount=type=cache,id=%s,target=/c echo x >> /c/n && wc -l < /c/n > /out\n"
	build := func(id string, salt int) string {
		out := d.local(fmt.Sprintf("FROM %s AS b\nENV SALT=%s%d\n"+count+"FROM scratch\nCOPY --from=b /out /\n", env.base, id, salt, id), nil)
		return strings.TrimSpace(readFile(t, out, "out"))
	}
	for salt, want := range []string{"1", "2"} {
		for _, id := range []string{"go", "npm"} {
			if got := build(id, salt); got != want {
				t.Errorf("%s has %s lines, want %s", id, got, want)
			}
		}
	}
	if r := d.buildctl("prune", "--filter", `type==exec.cachemount,cachemount.id=="/go"`).must(t); strings.Count(r.stdout, "true") != 1 {
		t.Errorf("pruned:\n%s", r.stdout)
	}
	if a, b := build("go", 3), build("npm", 3); a != "1" || b != "3" {
		t.Errorf("go has %s lines and npm %s, want 1 and 3", a, b)
	}
}

// A build that fills the disk says so; after a prune the daemon builds on.
func TestFullDisk(t *testing.T) {
	disk := t.TempDir()
	if err := unix.Mount("small", disk, "tmpfs", 0, "size=64m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(disk, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	d := newDaemonAt(t, filepath.Join(disk, "state"), "", "--oci-worker-gc=false")
	d.big("fits", 30).must(t)
	for range 3 {
		r := d.big("too big", 60).fails(t, "the disk that holds "+d.root+" is full", "of 64MiB that are free", "prune --all")
		if t.Failed() {
			t.Fatal(r.stderr)
		}
	}
	context := files{"f": strings.Repeat("0123456789abcdef", 3<<20)}
	d.dockerfile("FROM scratch\nCOPY f /\n", context).fails(t, "no space left on device", "the disk that holds "+d.root+" is full")
	// The files go in the background.
	if err := harness.WaitFor(harness.Patience, func() error {
		d.buildctl("prune", "--all").must(t)
		if r := d.big("fits too", 40); r.code != 0 {
			return errors.New(r.stderr)
		}
		return nil
	}); err != nil {
		t.Errorf("no build works after a prune: %v", err)
	}
	if _, err := os.Stat(d.root); err != nil {
		t.Fatal(err)
	}
}
