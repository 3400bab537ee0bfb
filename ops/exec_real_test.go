package ops

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/ops/sessiontest"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
)

// realBench is an execBench whose steps are real processes.
type realBench struct {
	*execBench
	rootfs *cache.Ref // busybox
}

const testCgroup = "/kiln-ops-test"

// eachRuntime runs test with the built-in runtime and with runc.
func eachRuntime(t *testing.T, test func(t *testing.T, b *realBench)) {
	for name, binary := range map[string]string{"builtin": "", "runc": "runc"} {
		t.Run(name, func(t *testing.T) { test(t, newRealBench(t, binary)) })
	}
}

// newRealBench runs steps with the given runtime; "" is the built-in one.
func newRealBench(t testing.TB, binary string) *realBench {
	t.Helper()
	b := &realBench{execBench: newExecBench(t, nil)}
	exec, err := executor.New(executor.Config{Root: t.TempDir(), Binary: binary, CgroupParent: testCgroup})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := exec.Close(); err != nil {
			t.Errorf("close executor: %v", err)
		}
		// runc makes the group in hierarchies without controllers too.
		left, err := filepath.Glob("/sys/fs/cgroup/*" + testCgroup)
		for _, dir := range left {
			err = errors.Join(err, os.Remove(dir))
		}
		if err != nil {
			t.Error(err)
		}
	})
	b.Loader.cfg.Executor = exec
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("this test needs a static busybox in /bin: %v", err)
	}
	b.rootfs = b.ref(nil, fileSet{"bin/busybox": string(busybox), "etc/passwd": "root:x:0:0::/:/bin/sh\n"})
	b.rootfs = b.change(b.rootfs, func(dir string) {
		if err := makeExecutable(filepath.Join(dir, "bin/busybox")); err != nil {
			t.Fatal(err)
		}
	})
	return b
}

// change commits a record on parent after fn has changed it.
func (b *realBench) change(parent *cache.Ref, fn func(dir string)) *cache.Ref {
	b.t.Helper()
	ref := commitRef(b.t, b.cache, parent, fn)
	b.t.Cleanup(ref.Release)
	return ref
}

// sh runs a script in the root filesystem, with more mounts, and returns what
// it printed.
func (b *realBench) sh(who asker, script string, mounts []*pb.Mount, inputs ...*cache.Ref) (string, error) {
	b.t.Helper()
	var mu sync.Mutex
	var out bytes.Buffer
	ctx := progress.With(context.Background(), progress.NewScope(progress.WriterFunc(func(e progress.Event) {
		mu.Lock()
		defer mu.Unlock()
		if e.Log != nil {
			out.Write(e.Log.Data)
		}
	}), "sha256:v"))
	inputs = append([]*cache.Ref{b.rootfs}, inputs...)
	op := b.op(&pb.ExecOp{
		Meta:   &pb.Meta{Args: []string{"/bin/busybox", "sh", "-c", `PATH=/bb; /bin/busybox mkdir /bb; /bin/busybox --install -s /bb; ` + script}},
		Mounts: append([]*pb.Mount{rootMount()}, mounts...),
	}, len(inputs), nil)
	results, err := op.Exec(ctx, who, results(inputs...))
	solver.ReleaseRemains(err)
	for _, r := range results {
		r.Release()
	}
	mu.Lock()
	defer mu.Unlock()
	return out.String(), err
}

// compat: LLB-046, LLB-047, LLB-048
func TestRealMounts(t *testing.T) {
	eachRuntime(t, func(t *testing.T, b *realBench) {
		who := b.session(sessiontest.Secrets{"s": "hush"}.Service(), fakeAgent{known: "key"})
		in := b.ref(nil, fileSet{"sub/f": "part", "g": "whole"})
		out, err := b.sh(who, `set -e
			cat /run/secret; echo; stat -c '%u %g %a' /run/secret
			touch /run/secret 2>/dev/null && echo writable
			test -S /run/agent && stat -c '%u %g %a' /run/agent
			cat /in/g /part/f; echo
			touch /in/x 2>/dev/null && echo writable
			stat -f -c %T /t; touch /t/x
			dd if=/dev/zero of=/t/big bs=1k count=64 2>/dev/null && echo no limit
			true`, []*pb.Mount{
			secretMount("/run/secret", &pb.SecretOpt{ID: "s", Uid: 5, Gid: 6, Mode: 0o440}),
			sshMount("/run/agent", &pb.SSHOpt{ID: "key", Uid: 7, Gid: 8, Mode: 0o600}),
			{Input: 1, Dest: "/in", Output: -1, Readonly: true},
			{Input: 1, Dest: "/part", Output: -1, Readonly: true, Selector: "sub"},
			{Input: -1, Dest: "/t", Output: -1, MountType: pb.MountType_TMPFS, TmpfsOpt: &pb.TmpfsOpt{Size: 16 << 10}},
		}, in)
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		want := "hush\n5 6 440\n7 8 600\nwholepart\ntmpfs\n"
		if out != want {
			t.Errorf("the step prints\n%s, want\n%s", out, want)
		}
	})
}

// compat: LLB-044, LLB-045
// Two processes share a cache mount that has a base: each sees what the other
// writes, so it is one file system.
func TestRealSharedCacheMount(t *testing.T) {
	eachRuntime(t, func(t *testing.T, b *realBench) {
		base := b.ref(nil, fileSet{"base": "from the base"})
		m := cacheMount("/c", "id", pb.CacheSharingOpt_SHARED)
		m.Input = 1
		var steps sync.WaitGroup
		// Each waits for the other to come to a pipe in the mount.
		for _, script := range []string{
			`echo hello > /c/there; read x < /c/back; echo $x`,
			`read x < /c/there; echo $x again > /c/back; echo $x`,
		} {
			steps.Go(func() {
				out, err := b.sh(asker{}, `cat /c/base; mkfifo /c/there /c/back 2>/dev/null; `+script, []*pb.Mount{m}, base)
				if err != nil || !strings.HasPrefix(out, "from the basehello") {
					t.Errorf("%s: %v, prints %q", script, err, out)
				}
			})
		}
		steps.Wait()
		out, err := b.sh(asker{}, "ls /c", []*pb.Mount{m}, base)
		if got := strings.Fields(out); err != nil || strings.Join(got, " ") != "back base there" {
			t.Errorf("afterwards it holds %q, %v", got, err)
		}
		if got := tree(t, mustView(t, base)); !maps.Equal(got, fileSet{"base": "from the base"}) {
			t.Errorf("the base became %v", got)
		}
	})
}

func mustView(t *testing.T, ref *cache.Ref) string {
	t.Helper()
	view, err := ref.Open(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { view.Close() })
	return view.Path() + "/"
}

// compat: CTL-087
func TestRealFailure(t *testing.T) {
	eachRuntime(t, func(t *testing.T, b *realBench) {
		out, err := b.sh(asker{}, "echo to stdout; echo to stderr >&2; exit 42", nil)
		if err == nil || !strings.HasSuffix(err.Error(), "did not complete successfully: exit code: 42") {
			t.Errorf("error is %v", err)
		}
		if !strings.Contains(out, "to stdout\n") || !strings.Contains(out, "to stderr\n") {
			t.Errorf("output is %q", out)
		}
	})
}

func BenchmarkExec(b *testing.B) {
	bench := &realBench{execBench: newExecBench(b, nil)}
	exec, err := executor.New(executor.Config{Root: b.TempDir(), CgroupParent: testCgroup})
	if err != nil {
		b.Fatal(err)
	}
	defer exec.Close()
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		b.Fatal(err)
	}
	bench.rootfs = bench.ref(nil, fileSet{"bin/busybox": string(busybox)})
	bench.rootfs = bench.change(bench.rootfs, func(dir string) {
		if err := makeExecutable(filepath.Join(dir, "bin/busybox")); err != nil {
			b.Fatal(err)
		}
	})
	for _, c := range []struct {
		name string
		exec executor.Executor
	}{{"process", exec}, {"nothing", &fakeRun{}}} {
		b.Run(c.name, func(b *testing.B) {
			bench.Loader.cfg.Executor = c.exec
			op := bench.op(&pb.ExecOp{Meta: &pb.Meta{Args: []string{"/bin/busybox", "true"}}}, 1, nil)
			for b.Loop() {
				out, err := op.Exec(context.Background(), asker{}, results(bench.rootfs))
				if err != nil {
					b.Fatal(err)
				}
				out[0].Release()
			}
		})
	}
}

// fakeRun does nothing, to show what is around a process.
type fakeRun struct{}

func (fakeRun) Run(context.Context, executor.Process) (executor.Usage, error) {
	return executor.Usage{}, nil
}
func (fakeRun) Close() error { return nil }
