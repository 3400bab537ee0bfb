package ops

import (
	"context"
	"testing"

	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
)

func TestRepeat(t *testing.T) {
	root := func() *pb.Mount { return rootMount() }
	with := func(m *pb.Mount) *pb.ExecOp { return &pb.ExecOp{Mounts: []*pb.Mount{root(), m}} }
	for _, c := range []struct {
		name     string
		op       *pb.Op
		obstacle string
	}{
		{"plain", execOf(&pb.ExecOp{}), ""},
		{"tmpfs", execOf(with(&pb.Mount{Input: -1, Output: -1, Dest: "/t", MountType: pb.MountType_TMPFS, TmpfsOpt: &pb.TmpfsOpt{}})), ""},
		{"host network", execOf(&pb.ExecOp{Network: pb.NetMode_HOST}), ""},
		{"insecure", execOf(&pb.ExecOp{Security: pb.SecurityMode_INSECURE}), "insecure"},
		{"cache mount", execOf(with(&pb.Mount{Input: -1, Output: -1, Dest: "/c", MountType: pb.MountType_CACHE, CacheOpt: &pb.CacheOpt{ID: "c"}})), "cache mount"},
		{"secret file", execOf(with(&pb.Mount{Input: -1, Output: -1, Dest: "/s", MountType: pb.MountType_SECRET, SecretOpt: &pb.SecretOpt{ID: "s"}})), "secret"},
		{"secret variable", execOf(&pb.ExecOp{Secretenv: []*pb.SecretEnv{{ID: "s", Name: "S"}}}), "secret"},
		{"ssh", execOf(with(&pb.Mount{Input: -1, Output: -1, Dest: "/a", MountType: pb.MountType_SSH, SSHOpt: &pb.SSHOpt{ID: "default"}})), "ssh"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDef(t)
			src := d.add(sourceOf("test://base"))
			c.op.Inputs = []*pb.Input{input(src, 0)}
			edge, err := newTestLoader(t, Config{}).Load(d.done(d.add(c.op), 0),
				LoadOptions{Entitlements: map[string]bool{entitlementNetworkHost: true, entitlementInsecure: true}})
			if err != nil {
				t.Fatal(err)
			}
			op, obstacle := Repeat(edge.Vertex)
			if obstacle != c.obstacle || (op == nil) != (obstacle != "") {
				t.Errorf("op %v, obstacle %q, want %q", op, obstacle, c.obstacle)
			}
			if op, obstacle := Repeat(edge.Vertex.Inputs[0].Vertex); op != nil || obstacle != "source" {
				t.Errorf("a source: op %v, obstacle %q", op, obstacle)
			}
		})
	}
}

// A repeated step keeps its limits, yields to others, and has the key that it
// always had.
func TestRepeatRunsLow(t *testing.T) {
	b := newExecBench(t, nil)
	for _, limits := range []*pb.LinuxResources{nil, {Memory: 1 << 20, CpuShares: 512}} {
		op := b.op(&pb.ExecOp{}, 1, &pb.OpMetadata{LinuxResources: limits})
		low, obstacle := Repeat(&solver.Vertex{Op: op})
		if obstacle != "" {
			t.Fatal(obstacle)
		}
		b.run(low.(*execOp), nil, b.ref(nil, fileSet{"a": "1"}))
		got := b.exec.runs[len(b.exec.runs)-1].Resources
		if got == nil || got.CPUShares != lowCPUShares || got.Memory != limits.GetMemory() {
			t.Errorf("limits %v: ran with %+v", limits, got)
		}
		if op.resources.GetCpuShares() != limits.GetCpuShares() {
			t.Error("the build's own op has changed")
		}
		was, _, err := op.CacheMap(context.Background(), asker{}, 0)
		is, _, lerr := low.CacheMap(context.Background(), asker{}, 0)
		if err != nil || lerr != nil || was.Digest != is.Digest {
			t.Errorf("key %v (%v), was %v (%v)", is, lerr, was, err)
		}
	}
}
