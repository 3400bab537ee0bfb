package ops

import (
	"context"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
)

// goldenCase is an op with the cache map that it must have, digests without
// their "sha256:".
type goldenCase struct {
	name   string
	op     *pb.Op
	digest string
	deps   []string // per input: its selector, and whether it may be matched by content
}

// The digests in goldenCases were printed by a program that made the ops of
// github.com/moby/buildkit v0.33.1 (solver/llbsolver/ops) from the same
// protobufs and called their CacheMap.
//
// compat: LLB-049, LLB-150, LLB-151, LLB-154, LLB-C55
func TestCacheMapsAreUpstreams(t *testing.T) {
	for _, c := range goldenCases() {
		t.Run(c.name, func(t *testing.T) {
			b := newDef(t)
			src := b.add(sourceOf("test://base"))
			for _, in := range c.op.Inputs {
				in.Digest, in.Index = string(src), 0
			}
			m := cacheMapOf(t, b.done(b.add(c.op), 0))
			if got := strings.TrimPrefix(string(m.Digest), "sha256:"); got != c.digest {
				t.Errorf("digest is %s, want %s", got, c.digest)
			}
			if len(m.Deps) != len(c.deps) {
				t.Fatalf("%d deps, want %d", len(m.Deps), len(c.deps))
			}
			for i, dep := range m.Deps {
				got := strings.TrimPrefix(string(dep.Selector), "sha256:") + " false"
				if dep.Content != nil {
					got = strings.TrimSuffix(got, "false") + "true"
				}
				if got != c.deps[i] {
					t.Errorf("dep %d is %q, want %q", i, got, c.deps[i])
				}
			}
		})
	}
}

// cacheMapOf loads def and returns the cache map of its target, with all that
// a build can be granted.
func cacheMapOf(t *testing.T, def *pb.Definition) *solver.CacheMap {
	t.Helper()
	all := map[string]bool{entitlementInsecure: true, entitlementNetworkHost: true}
	edge, err := newTestLoader(t, Config{}).Load(def, LoadOptions{Entitlements: all})
	if err != nil {
		t.Fatal(err)
	}
	m, more, err := edge.Vertex.Op.CacheMap(context.Background(), asker{}, 0)
	if err != nil {
		t.Fatal(err)
	}
	if more {
		t.Error("an op that isn't a source has more keys")
	}
	return m
}

func goldenInputs(n int) []*pb.Input {
	var in []*pb.Input
	for i := range n {
		in = append(in, &pb.Input{Digest: "sha256:0000000000000000000000000000000000000000000000000000000000000000", Index: int64(i)})
	}
	return in
}

func goldenExec(inputs int, e *pb.ExecOp) *pb.Op {
	return &pb.Op{Inputs: goldenInputs(inputs), Op: &pb.Op_Exec{Exec: e},
		Platform: &pb.Platform{OS: "linux", Architecture: "amd64"}}
}

func goldenMeta() *pb.Meta {
	return &pb.Meta{Args: []string{"/bin/sh", "-c", "echo <hi> & exit"}, Env: []string{"PATH=/bin", "A=ü"}, Cwd: "/src"}
}

func goldenCases() []goldenCase {
	root := func() *pb.Mount { return &pb.Mount{Input: 0, Dest: "/", Output: 0} }
	full := goldenMeta()
	full.User = "nobody"
	full.Hostname = "box"
	full.CgroupParent = "/builds"
	full.RemoveMountStubsRecursive = true
	full.ValidExitCodes = []int32{0, 3}
	full.ProxyEnv = &pb.ProxyEnv{HttpProxy: "http://proxy", NoProxy: "x"}
	full.ExtraHosts = []*pb.HostIP{{Host: "one", IP: "10.0.0.1"}, {Host: "two", IP: "::1"}}
	full.Ulimit = []*pb.Ulimit{{Name: "nofile", Soft: 10, Hard: 20}}
	arm := goldenExec(1, &pb.ExecOp{Meta: goldenMeta(), Mounts: []*pb.Mount{root()}})
	arm.Platform = &pb.Platform{OS: "linux", Architecture: "arm", Variant: "v7", OSVersion: "1.2", OSFeatures: []string{"f", "g"}}
	return []goldenCase{
		{name: "exec plain root", digest: "b80428b45b378d35e878114283e7a24411436d3f6900be96e02cbe6dc50fbaf0", deps: []string{"8a5edab282632443219e051e4ade2d1d5bbc671c781051bf1437897cbdfea0f1 false"},
			op: goldenExec(1, &pb.ExecOp{Meta: goldenMeta(), Mounts: []*pb.Mount{root()}})},
		{name: "exec other platform", digest: "ef442a2c556970aa316f7b5e2ab1b41a864aa2f8ec33a183083af7a853ddc1a0", deps: []string{"8a5edab282632443219e051e4ade2d1d5bbc671c781051bf1437897cbdfea0f1 false"},
			op: arm},
		{name: "exec scratch root", digest: "b80428b45b378d35e878114283e7a24411436d3f6900be96e02cbe6dc50fbaf0",
			op: goldenExec(0, &pb.ExecOp{Meta: goldenMeta(), Mounts: []*pb.Mount{{Input: -1, Dest: "/", Output: 0}}})},
		{name: "exec readonly root", digest: "5d0614df80406623dd7208a798d66f485739d901745759d0350cacc838f78257", deps: []string{"8a5edab282632443219e051e4ade2d1d5bbc671c781051bf1437897cbdfea0f1 false"},
			op: goldenExec(1, &pb.ExecOp{Meta: goldenMeta(), Mounts: []*pb.Mount{{Dest: "/", Output: 0, Readonly: true}}})},
		{name: "exec all of meta", digest: "4d83551d68c89e71caa54a89cbca1c531a1b4d06114ef5cb0ef55baeb7a08f99", deps: []string{"8a5edab282632443219e051e4ade2d1d5bbc671c781051bf1437897cbdfea0f1 false"},
			op: goldenExec(1, &pb.ExecOp{Meta: full, Mounts: []*pb.Mount{root()}, Network: pb.NetMode_HOST, Security: pb.SecurityMode_INSECURE,
				Secretenv: []*pb.SecretEnv{{ID: "tok", Name: "TOKEN", Optional: true}}})},
		{name: "exec binds", digest: "f27eaa97949014102949c4398071783cb5d2f7d5699206c8e86d4a490d853c17", deps: []string{"8a5edab282632443219e051e4ade2d1d5bbc671c781051bf1437897cbdfea0f1 false", "0a0b8df9a3f1e45f655920c56cfa848962b153105bffc54eaa5bc9aa56990846 true", "b3d1db318671a024a7e4b433389f8820d6ca466e2cf700afc29f37ed64f2fa0d false"},
			op: goldenExec(3, &pb.ExecOp{Meta: goldenMeta(), Mounts: []*pb.Mount{root(),
				{Input: 1, Dest: "/ro", Output: -1, Readonly: true, Selector: "a/b"},
				{Input: 1, Dest: "/ro2", Output: -1, Readonly: true, Selector: "/a"},
				{Input: 2, Dest: "/rw", Output: 1, Selector: "x"},
			}})},
		{name: "exec bind whole", digest: "670c0294cf85ccb239e7e39e0a761c475cc103673095d7e4dfc2019b43fbcb1f", deps: []string{"8a5edab282632443219e051e4ade2d1d5bbc671c781051bf1437897cbdfea0f1 false", "8a5edab282632443219e051e4ade2d1d5bbc671c781051bf1437897cbdfea0f1 true"},
			op: goldenExec(2, &pb.ExecOp{Meta: goldenMeta(), Mounts: []*pb.Mount{root(), {Input: 1, Dest: "/rw", Output: 1}}})},
		{name: "exec content off", digest: "2160cf1b6b3e33cfce53bf6a34440e2016547940e2f6e99cf488683ae9cdff11", deps: []string{"8a5edab282632443219e051e4ade2d1d5bbc671c781051bf1437897cbdfea0f1 false", "8a5edab282632443219e051e4ade2d1d5bbc671c781051bf1437897cbdfea0f1 false"},
			op: goldenExec(2, &pb.ExecOp{Meta: goldenMeta(), Mounts: []*pb.Mount{root(), {Input: 1, Dest: "/ro", Output: -1, Readonly: true, ContentCache: pb.MountContentCache_OFF}}})},
		{name: "exec root content on", digest: "b80428b45b378d35e878114283e7a24411436d3f6900be96e02cbe6dc50fbaf0", deps: []string{"8a5edab282632443219e051e4ade2d1d5bbc671c781051bf1437897cbdfea0f1 true"},
			op: goldenExec(1, &pb.ExecOp{Meta: goldenMeta(), Mounts: []*pb.Mount{{Dest: "/", ContentCache: pb.MountContentCache_ON}}})},
		{name: "exec cache mount", digest: "aeea2fd27df1b37033611207f2fcdfe2d15f52c2b013b036a76a068f4cd5309d", deps: []string{"8a5edab282632443219e051e4ade2d1d5bbc671c781051bf1437897cbdfea0f1 false"},
			op: goldenExec(1, &pb.ExecOp{Meta: goldenMeta(), Mounts: []*pb.Mount{root(),
				{Input: -1, Dest: "/c", Output: -1, MountType: pb.MountType_CACHE, CacheOpt: &pb.CacheOpt{ID: "mine", Sharing: pb.CacheSharingOpt_LOCKED}},
			}})},
		{name: "exec cache mounts by dest", digest: "ccca1701a5eda3e7999aa7993e383fabe7e516bcaccb68d7659b4f312cf8609d", deps: []string{"8a5edab282632443219e051e4ade2d1d5bbc671c781051bf1437897cbdfea0f1 false"},
			op: goldenExec(1, &pb.ExecOp{Meta: goldenMeta(), Mounts: []*pb.Mount{root(),
				{Input: -1, Dest: "/c", Output: -1, MountType: pb.MountType_CACHE, CacheOpt: &pb.CacheOpt{ID: "/c"}},
				{Input: -1, Dest: "/d", Output: -1, MountType: pb.MountType_CACHE, CacheOpt: &pb.CacheOpt{ID: "ns//d"}},
				{Input: -1, Dest: "/e", Output: -1, MountType: pb.MountType_CACHE, CacheOpt: &pb.CacheOpt{ID: "/e", Sharing: pb.CacheSharingOpt_PRIVATE}},
			}})},
		{name: "exec tmpfs secret ssh", digest: "0ed8398be88d2e72ebf5fdbe542842a171b3e6ed5632439f055637e41c087fd1", deps: []string{"8a5edab282632443219e051e4ade2d1d5bbc671c781051bf1437897cbdfea0f1 false"},
			op: goldenExec(1, &pb.ExecOp{Meta: goldenMeta(), Mounts: []*pb.Mount{root(),
				{Input: -1, Dest: "/t", Output: -1, MountType: pb.MountType_TMPFS, TmpfsOpt: &pb.TmpfsOpt{Size: 4096}},
				{Input: -1, Dest: "/s", Output: -1, MountType: pb.MountType_SECRET, SecretOpt: &pb.SecretOpt{ID: "s", Uid: 1, Gid: 2, Mode: 0400}},
				{Input: -1, Dest: "/a", Output: -1, MountType: pb.MountType_SSH, SSHOpt: &pb.SSHOpt{ID: "default", Mode: 0600, Optional: true}},
			}})},
		{name: "merge", digest: "221241801d19c94060bf1b39377aa1e22db9d7918df4570773a207c1eb71b5fe", deps: []string{" false", " false", " false"},
			op: &pb.Op{Inputs: goldenInputs(3), Op: &pb.Op_Merge{Merge: &pb.MergeOp{Inputs: []*pb.MergeInput{{Input: 0}, {Input: 1}, {Input: 2}}}}}},
		{name: "merge of none", digest: "f2780c6c12bc779a071aa898ce3f411dbe8c82302f73e057a7e29f42a8d01178",
			op: &pb.Op{Op: &pb.Op_Merge{Merge: &pb.MergeOp{}}}},
		{name: "diff", digest: "164ae6dac10aea8de6cb7cda35914a10011485523f807ea840bca3e0ab19d8ff", deps: []string{" false", " false"},
			op: &pb.Op{Inputs: goldenInputs(2), Op: &pb.Op_Diff{Diff: &pb.DiffOp{Lower: &pb.LowerDiffInput{Input: 0}, Upper: &pb.UpperDiffInput{Input: 1}}}}},
		{name: "diff of scratch", digest: "f5284a0f1782a8c2cdb29841228c32706cbf04332ad37c3c7cb41659c6eeba0a", deps: []string{" false"},
			op: &pb.Op{Inputs: goldenInputs(1), Op: &pb.Op_Diff{Diff: &pb.DiffOp{Lower: &pb.LowerDiffInput{Input: -1}, Upper: &pb.UpperDiffInput{Input: 0}}}}},
		{name: "passthrough", digest: "24f1e85da86016417113c4d69b614d6d20915e1207f93eb66821d4b8e48a8b7c", deps: []string{" false", " false"},
			op: &pb.Op{Inputs: goldenInputs(2), Op: &pb.Op_Passthrough{Passthrough: &pb.PassthroughOp{Id: "p1", Outputs: []int64{1, 0, 1}}}}},
	}
}
