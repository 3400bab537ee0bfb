package ops

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/solver"
	gatewaypb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/grpcerrors"
	"google.golang.org/grpc/status"
)

// compat: LLB-021, LLB-C41, LLB-C50
// All that an op says of its process reaches the executor.
func TestExecProcess(t *testing.T) {
	b := newExecBench(t, nil)
	op := b.op(&pb.ExecOp{
		Meta: &pb.Meta{
			Args: []string{"sh", "-c", "true"}, Env: []string{"A=1"}, Cwd: "/src", User: "1:2", Hostname: "box",
			CgroupParent: "/group", RemoveMountStubsRecursive: true, ValidExitCodes: []int32{3, 4},
			ExtraHosts: []*pb.HostIP{{Host: "h", IP: "10.1.2.3"}}, Ulimit: []*pb.Ulimit{{Name: "nofile", Soft: 1, Hard: 2}},
			ProxyEnv: &pb.ProxyEnv{HttpProxy: "http://p", NoProxy: "x"},
		},
		Network: pb.NetMode_HOST, Security: pb.SecurityMode_INSECURE,
		Mounts: []*pb.Mount{{Input: -1, Dest: "/"}},
	}, 0, &pb.OpMetadata{LinuxResources: &pb.LinuxResources{Memory: 1, MemorySwap: 2, CpuShares: 3, CpuPeriod: 4, CpuQuota: 5, CpusetCpus: "6", CpusetMems: "7"}})
	b.run(op, asker{})
	b.run(op, asker{})

	p := b.exec.runs[0]
	if p.ID == "" || p.ID == b.exec.runs[1].ID {
		t.Errorf("two runs have ids %q and %q", p.ID, b.exec.runs[1].ID)
	}
	got := fmt.Sprint(p.Args, p.Env, p.Cwd, p.User, p.Hostname, p.CgroupParent, p.RemoveMountStubsRecursive, p.ValidExitCodes,
		p.ExtraHosts, p.Ulimits, p.Network, p.Security, *p.Resources, p.ReadonlyRoot)
	want := fmt.Sprint([]string{"sh", "-c", "true"},
		[]string{"A=1", "HTTP_PROXY=http://p", "http_proxy=http://p", "NO_PROXY=x", "no_proxy=x", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
		"/src", "1:2", "box", "/group", true, []int{3, 4},
		[]executor.HostIP{{Host: "h", IP: net.ParseIP("10.1.2.3")}}, []executor.Ulimit{{Name: "nofile", Soft: 1, Hard: 2}},
		executor.NetHost, executor.SecurityInsecure, executor.Resources{Memory: 1, MemorySwap: 2, CPUShares: 3, CPUPeriod: 4, CPUQuota: 5, CpusetCpus: "6", CpusetMems: "7"}, false)
	if got != want {
		t.Errorf("process is\n%s, want\n%s", got, want)
	}
}

func TestExecKeepsPath(t *testing.T) {
	b := newExecBench(t, nil)
	b.run(b.op(&pb.ExecOp{Meta: &pb.Meta{Args: []string{"x"}, Env: []string{"PATH=/mine"}}, Mounts: []*pb.Mount{{Input: -1, Dest: "/"}}}, 0, nil), asker{})
	p := b.exec.runs[0]
	if !slices.Equal(p.Env, []string{"PATH=/mine"}) || p.Cwd != "/" || p.ValidExitCodes != nil || p.Resources != nil {
		t.Errorf("env %q, cwd %q, valid exit codes %v, resources %v", p.Env, p.Cwd, p.ValidExitCodes, p.Resources)
	}
}

// compat: LLB-041, LLB-042, LLB-013
func TestExecBinds(t *testing.T) {
	b := newExecBench(t, func(_ context.Context, _ executor.Process, at map[string]string) error {
		write(t, at["/"]+"new", "root")
		write(t, at["/src/rw"]+"new", "rw")
		write(t, at["/scratch"]+"new", "scratch")
		write(t, at["/thrown"]+"new", "thrown away")
		if got := tree(t, at["/ro"])["ro"]; got != "ro file" {
			t.Errorf("read-only input holds %q", got)
		}
		if got := tree(t, at["/part"]); len(got) != 1 || got["x"] != "part" {
			t.Errorf("a selected part holds %v", got)
		}
		return nil
	})
	base, ro := b.ref(nil, fileSet{"base": "base file"}), b.ref(nil, fileSet{"ro": "ro file", "sub/x": "part"})
	op := b.op(&pb.ExecOp{Meta: &pb.Meta{Args: []string{"x"}, Cwd: "/src"}, Mounts: []*pb.Mount{
		{Input: 0, Dest: "/", Output: 0},
		{Input: 1, Dest: "/ro", Output: 1, Readonly: true},
		{Input: 0, Dest: "rw", Output: 2},
		{Input: -1, Dest: "/scratch", Output: 3},
		{Input: 1, Dest: "/thrown", Output: -1},
		{Input: 1, Dest: "/part", Output: -1, Readonly: true, Selector: "sub"},
	}}, 2, nil)
	out := b.run(op, asker{}, base, ro)
	if len(out) != 4 {
		t.Fatalf("%d outputs, want 4", len(out))
	}
	wantFiles(t, "root", out[0], fileSet{"base": "base file", "new": "root"})
	if out[1].ID() != ro.ID() {
		t.Errorf("the output of a read-only mount is %s, want its input %s", out[1].ID(), ro.ID())
	}
	wantFiles(t, "rw", out[2], fileSet{"base": "base file", "new": "rw"})
	wantFiles(t, "scratch", out[3], fileSet{"new": "scratch"})
	wantFiles(t, "base", Result{base}, fileSet{"base": "base file"})
	wantFiles(t, "ro", Result{ro}, fileSet{"ro": "ro file", "sub/x": "part"})

	readonly := map[string]bool{}
	for _, m := range b.exec.runs[0].Mounts {
		readonly[m.Dest] = m.Readonly
	}
	for dest, want := range map[string]bool{"/ro": true, "/src/rw": false, "/scratch": false, "/thrown": false, "/part": true} {
		if got, ok := readonly[dest]; !ok || got != want {
			t.Errorf("mount %s: read-only %v (there %v), want %v", dest, got, ok, want)
		}
	}
}

// The root gets a layer even if the process may not write to it, since mount
// points are made in it.
//
// compat: LLB-043
func TestExecReadonlyRoot(t *testing.T) {
	b := newExecBench(t, func(_ context.Context, p executor.Process, at map[string]string) error {
		if !p.ReadonlyRoot {
			t.Error("the process may write to its root")
		}
		write(t, at["/"]+"stub", "")
		write(t, at["/out"]+"made", "it")
		return nil
	})
	base := b.ref(nil, fileSet{"base": "x"})
	op := b.op(&pb.ExecOp{Mounts: []*pb.Mount{{Input: 0, Dest: "/", Output: -1, Readonly: true}, {Input: -1, Dest: "/out", Output: 0}}}, 1, nil)
	out := b.run(op, asker{}, base)
	wantFiles(t, "output", out[0], fileSet{"made": "it"})
	wantFiles(t, "base", Result{base}, fileSet{"base": "x"})
}

// compat: LLB-046
func TestExecTmpfs(t *testing.T) {
	b := newExecBench(t, nil)
	b.run(b.op(&pb.ExecOp{Mounts: []*pb.Mount{
		{Input: -1, Dest: "/"},
		{Input: -1, Dest: "/t", Output: -1, MountType: pb.MountType_TMPFS, TmpfsOpt: &pb.TmpfsOpt{Size: 4096}},
		{Input: -1, Dest: "/u", Output: -1, MountType: pb.MountType_TMPFS},
	}}, 0, nil), asker{})
	want := [][]string{{"nosuid", "size=4096"}, {"nosuid"}}
	for i, m := range b.exec.runs[0].Mounts {
		if src := m.Source[0]; src.Type != "tmpfs" || !slices.Equal(src.Options, want[i]) {
			t.Errorf("mount %s is %v, want a tmpfs with %q", m.Dest, src, want[i])
		}
	}
}

// compat: CTL-080, CTL-087
func TestExecFailure(t *testing.T) {
	b := newExecBench(t, func(_ context.Context, p executor.Process, at map[string]string) error {
		fmt.Fprintln(p.Stderr, "it broke")
		write(t, at["/"]+"half", "done")
		return &executor.ExitError{Code: 17}
	})
	var log strings.Builder
	ctx := progress.With(context.Background(), progress.NewScope(progress.WriterFunc(func(e progress.Event) {
		fmt.Fprintf(&log, "%d:%s", e.Log.Stream, e.Log.Data)
	}), "sha256:v"))
	op := b.op(&pb.ExecOp{Meta: &pb.Meta{Args: []string{"sh", "-c", `echo "x"`}}, Mounts: []*pb.Mount{{Input: -1, Dest: "/"}}}, 0, nil)
	_, err := op.Exec(ctx, asker{}, nil)
	defer solver.ReleaseRemains(err)
	if want := `process "sh -c echo \"x\"" did not complete successfully: exit code: 17`; err == nil || err.Error() != want {
		t.Errorf("error is %v, want %s", err, want)
	}
	var exit *gatewaypb.ExitError
	if !errors.As(err, &exit) || exit.ExitCode != 17 {
		t.Errorf("exit code isn't carried: %#v", exit)
	}
	st := status.Convert(grpcerrors.ToGRPC(ctx, err)).Proto()
	found := false
	for _, d := range st.Details {
		found = found || d.TypeUrl == "github.com/moby/buildkit/gatewayapi.ExitMessage+json" && string(d.Value) == `{"Code":17}`
	}
	if !found || !strings.HasPrefix(st.Message, "process ") {
		t.Errorf("on the wire the error is %v", st)
	}
	if log.String() != "2:it broke\n" {
		t.Errorf("log is %q", log.String())
	}
}

func TestExecCancelled(t *testing.T) {
	gone := errors.New("client gone")
	ctx, cancel := context.WithCancelCause(context.Background())
	b := newExecBench(t, func(context.Context, executor.Process, map[string]string) error {
		cancel(gone)
		return &executor.ExitError{Code: 137}
	})
	_, err := b.op(&pb.ExecOp{Mounts: []*pb.Mount{{Input: -1, Dest: "/"}}}, 0, nil).Exec(ctx, asker{}, nil)
	if !errors.Is(err, gone) {
		t.Errorf("error is %v, want %v in it", err, gone)
	}
}

// A failed process leaves what it was given and what it made of it, for each
// mount. compat: LLB-034
func TestExecRemains(t *testing.T) {
	b := newExecBench(t, func(_ context.Context, _ executor.Process, at map[string]string) error {
		write(t, at["/"]+"half", "done")
		write(t, at["/thrown"]+"half", "done")
		return &executor.ExitError{Code: 1}
	})
	base := b.ref(nil, fileSet{"base": "x"})
	op := b.op(&pb.ExecOp{Mounts: []*pb.Mount{
		{Input: 0, Dest: "/ro", Output: 0, Readonly: true},
		{Input: 0, Dest: "/thrown", Output: -1},
		{Input: 0, Dest: "/", Output: 1},
		{Input: -1, Dest: "/c", Output: -1, MountType: pb.MountType_CACHE, CacheOpt: &pb.CacheOpt{ID: "c"}},
		{Input: 0, Dest: "/seen", Output: -1, Readonly: true},
		{Input: -1, Dest: "/t", Output: -1, MountType: pb.MountType_TMPFS},
	}}, 1, nil)
	_, err := op.Exec(context.Background(), asker{}, results(base))
	var left *solver.Remains
	if !errors.As(err, &left) {
		t.Fatalf("error without remains: %v", err)
	}
	defer left.Release()
	before, after := fileSet{"base": "x"}, fileSet{"base": "x", "half": "done"}
	for i, want := range []fileSet{before, after, after, nil, before, nil} {
		if want == nil {
			if left.Inputs[i] != nil || left.Left[i] != nil {
				t.Errorf("mount %d left %v of %v", i, left.Left[i], left.Inputs[i])
			}
			continue
		}
		wantFiles(t, fmt.Sprintf("input of mount %d", i), left.Inputs[i], before)
		wantFiles(t, fmt.Sprintf("what mount %d left", i), left.Left[i], want)
	}
}

// Whatever fails, nothing that the step acquired stays: the cache's own check
// at Close (in newTestCache) finds what does.
func TestExecGivesBackOnFailure(t *testing.T) {
	b := newExecBench(t, func(context.Context, executor.Process, map[string]string) error { return &executor.ExitError{Code: 1} })
	base := b.ref(nil, fileSet{"base": "x"})
	op := b.op(&pb.ExecOp{Mounts: []*pb.Mount{
		{Input: 0, Dest: "/", Output: 0},
		{Input: 0, Dest: "/ro", Output: 1, Readonly: true},
		{Input: 0, Dest: "/thrown", Output: -1},
		{Input: -1, Dest: "/c", Output: -1, MountType: pb.MountType_CACHE, CacheOpt: &pb.CacheOpt{ID: "c"}},
	}}, 1, nil)
	_, err := op.Exec(context.Background(), asker{}, results(base))
	if err == nil {
		t.Fatal("no error")
	}
	solver.ReleaseRemains(err)
	if n := len(b.caches.keys); n != 0 {
		t.Errorf("%d cache mounts are still held", n)
	}
}

// An input whose files are gone is reported as lost, not as an error of the
// step, wherever it is met.
func TestExecLostInput(t *testing.T) {
	for name, c := range map[string]struct {
		mount *pb.Mount
		lost  int
	}{
		"read-only":   {&pb.Mount{Input: 1, Dest: "/x", Output: -1, Readonly: true}, 1},
		"written":     {&pb.Mount{Input: 1, Dest: "/x", Output: -1}, 1},
		"cache mount": {&pb.Mount{Input: 1, Dest: "/x", Output: -1, MountType: pb.MountType_CACHE, CacheOpt: &pb.CacheOpt{ID: "c"}}, 1},
		"another":     {&pb.Mount{Input: 2, Dest: "/x", Output: -1, Readonly: true}, -1},
	} {
		t.Run(name, func(t *testing.T) {
			b := newExecBench(t, nil)
			base, gone, whole := b.ref(nil, fileSet{"a": "1"}), b.ref(nil, fileSet{"gone": "1"}), b.ref(nil, fileSet{"b": "1"})
			b.removeFiles("gone")
			op := b.op(&pb.ExecOp{Mounts: []*pb.Mount{{Input: 0, Dest: "/", Output: 0}, c.mount}}, 3, nil)
			out, err := op.Exec(context.Background(), asker{}, results(base, gone, whole))
			var lost *solver.LostError
			switch {
			case c.lost < 0 && err != nil:
				t.Error(err)
			case c.lost < 0:
				out[0].Release()
			case !errors.As(err, &lost) || !slices.Equal(lost.Inputs, []int{c.lost}):
				t.Errorf("error is %v, want input %d to be lost", err, c.lost)
			}
		})
	}
}

// removeFiles removes the snapshot that holds a file of that name.
func (b *execBench) removeFiles(name string) {
	b.t.Helper()
	found, err := filepath.Glob(filepath.Join(b.root, "snapshots", "*", "fs", name))
	if err != nil || len(found) != 1 {
		b.t.Fatalf("snapshots with %s: %q, %v", name, found, err)
	}
	if err := os.RemoveAll(filepath.Dir(filepath.Dir(found[0]))); err != nil {
		b.t.Fatal(err)
	}
}

// compat: LLB-032
func TestExecForeignPlatform(t *testing.T) {
	b := newExecBench(t, nil)
	t.Setenv("PATH", t.TempDir())
	d := newDef(t)
	op := execOf(&pb.ExecOp{Mounts: []*pb.Mount{{Input: -1, Dest: "/"}}})
	op.Platform = &pb.Platform{OS: "linux", Architecture: "pdp11"}
	edge, err := b.Load(d.done(d.add(op), 0), LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = edge.Vertex.Op.Exec(context.Background(), asker{}, nil)
	if err == nil || !strings.Contains(err.Error(), "linux/pdp11") || !strings.Contains(err.Error(), "buildkit-qemu-pdp11") {
		t.Errorf("error is %v", err)
	}
	if len(b.exec.runs) != 0 {
		t.Error("it ran all the same")
	}

	// With a helper in PATH the command is run through it.
	dir := t.TempDir()
	write(t, dir+"/buildkit-qemu-pdp11", "#!")
	if err := makeExecutable(dir + "/buildkit-qemu-pdp11"); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	out, err := edge.Vertex.Op.Exec(context.Background(), asker{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	out[0].Release()
	p := b.exec.runs[0]
	if !slices.Equal(p.Args, []string{emulatorPath, "run", "it"}) {
		t.Errorf("args are %q", p.Args)
	}
	want := executor.Mount{Dest: emulatorPath, Source: []mount.Mount{{Type: "bind", Source: dir, Options: []string{"rbind", "ro"}}}, Selector: "buildkit-qemu-pdp11", Readonly: true}
	if len(p.Mounts) != 1 || fmt.Sprint(p.Mounts[0]) != fmt.Sprint(want) {
		t.Errorf("mounts are %v, want %v", p.Mounts, want)
	}
}
