package ops

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// compat: LLB-001
func TestLoadFollowsThePointer(t *testing.T) {
	b := newDef(t)
	src := b.add(sourceOf("test://base"))
	run := b.add(execOf(&pb.ExecOp{Mounts: []*pb.Mount{rootMount(), {Input: -1, Dest: "/out", Output: 1}}}, input(src, 0)))
	edge, err := newTestLoader(t, Config{}).Load(b.done(run, 1), LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if edge.Vertex.Digest != run || edge.Index != 1 {
		t.Errorf("got output %d of %s, want 1 of %s", edge.Index, edge.Vertex.Digest, run)
	}
	if in := edge.Vertex.Inputs; len(in) != 1 || in[0].Vertex.Digest != src || in[0].Index != 0 {
		t.Errorf("inputs are %v, want output 0 of %s", in, src)
	}
}

// compat: LLB-001
// The digest is of the bytes as they came, though they could be shorter.
func TestLoadKeepsReceivedBytes(t *testing.T) {
	b := newDef(t)
	b.add(sourceOf("test://base"))
	raw := append(b.def.Def[0], 0xf8, 0x07, 0x01) // field 127, unknown, is 1
	b.def.Def[0] = raw
	dgst := digest.FromBytes(raw)
	edge, err := newTestLoader(t, Config{}).Load(b.done(dgst, 0), LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if edge.Vertex.Digest != dgst {
		t.Errorf("digest is %s, want %s", edge.Vertex.Digest, dgst)
	}
}

func TestLoadScratch(t *testing.T) {
	for _, def := range []*pb.Definition{nil, {}, {Metadata: map[string]*pb.OpMetadata{"x": nil}}} {
		edge, err := newTestLoader(t, Config{}).Load(def, LoadOptions{})
		if err != nil || edge.Vertex != nil {
			t.Errorf("Load(%v) = %v, %v; want scratch", def, edge, err)
		}
	}
}

// compat: LLB-003, LLB-049
func TestLoadRefusesWhatCannotBe(t *testing.T) {
	withExec := func(change func(e *pb.ExecOp)) *pb.Definition {
		op := execOf(&pb.ExecOp{})
		change(op.GetExec())
		return onSource(t, op)
	}
	withMount := func(m *pb.Mount) *pb.Definition {
		return withExec(func(e *pb.ExecOp) { e.Mounts = append(e.Mounts, m) })
	}
	src := func(b *defBuilder) digest.Digest { return b.add(sourceOf("test://base")) }
	cases := []struct {
		name string
		def  *pb.Definition
		want string
	}{
		{"one op", &pb.Definition{Def: [][]byte{nil}}, "one op"},
		{"garbage", func() *pb.Definition {
			b := newDef(t)
			d := src(b)
			b.def.Def = append(b.def.Def, []byte("\x0a\xff"))
			return b.done(d, 0)
		}(), "parse op 1"},
		{"text that isn't UTF-8", func() *pb.Definition {
			b := newDef(t)
			d := src(b)
			b.def.Def = append(b.def.Def, []byte("\x1a\x03\x0a\x01\xff"))
			return b.done(d, 0)
		}(), "UTF-8"},
		{"input missing", func() *pb.Definition {
			b := newDef(t)
			return b.done(b.add(execOf(&pb.ExecOp{}, input("sha256:none", 0))), 0)
		}(), `inputs[0].digest: "sha256:none" is no op`},
		{"input of an unused op missing", func() *pb.Definition {
			b := newDef(t)
			d := src(b)
			b.add(execOf(&pb.ExecOp{}, input("sha256:none", 0)))
			return b.done(d, 0)
		}(), `inputs[0].digest: "sha256:none" is no op`},
		{"input without digest", func() *pb.Definition {
			b := newDef(t)
			return b.done(b.add(execOf(&pb.ExecOp{}, &pb.Input{})), 0)
		}(), `inputs[0].digest: "" is no op`},
		{"negative index", func() *pb.Definition {
			b := newDef(t)
			return b.done(b.add(execOf(&pb.ExecOp{}, input(src(b), -1))), 0)
		}(), "inputs[0].index: output -1"},
		{"index out of range", func() *pb.Definition {
			b := newDef(t)
			return b.done(b.add(execOf(&pb.ExecOp{}, input(src(b), 1))), 0)
		}(), "inputs[0].index: op sha256:"},
		{"huge index", func() *pb.Definition {
			b := newDef(t)
			return b.done(src(b), 1<<62)
		}(), "has no output 4611686018427387904"},
		{"pointer without input", func() *pb.Definition {
			b := newDef(t)
			src(b)
			b.add(&pb.Op{})
			return b.def
		}(), "no input"},
		{"pointer that is a step", func() *pb.Definition {
			b := newDef(t)
			b.add(execOf(&pb.ExecOp{}, input(src(b), 0)))
			return b.def
		}(), "a step itself"},
		{"no body", single(t, &pb.Op{}), "no body"},
		{"empty source", single(t, &pb.Op{Op: &pb.Op_Source{Source: &pb.SourceOp{}}}), "source.identifier"},
		{"source with input", onSource(t, sourceOf("test://x")), "a source has no inputs"},
		{"source without scheme", single(t, sourceOf("x")), `"x" isn't of the form`},
		{"empty exec", single(t, &pb.Op{Op: &pb.Op_Exec{Exec: &pb.ExecOp{}}}), "exec.meta: it is missing"},
		{"exec without args", withExec(func(e *pb.ExecOp) { e.Meta.Args = nil }), "exec.meta.args"},
		{"exec without mounts", withExec(func(e *pb.ExecOp) { e.Mounts = nil }), "exec.mounts"},
		{"exec without root", withExec(func(e *pb.ExecOp) { e.Mounts[0].Dest = "/x" }), "exec.mounts"},
		{"exec with a tmpfs root", withExec(func(e *pb.ExecOp) { e.Mounts[0].MountType = pb.MountType_TMPFS }), "invalid mount type TMPFS for /"},
		{"exec with two roots", withMount(&pb.Mount{Dest: "/", Output: -1}), "second root"},
		{"root by another name", withExec(func(e *pb.ExecOp) { e.Mounts[0].Dest = "/x/.." }), "must be written"},
		{"root selector", withExec(func(e *pb.ExecOp) { e.Mounts[0].Selector = "/sub" }), "exec.mounts[0].selector"},
		{"mount input", withMount(&pb.Mount{Input: 1, Dest: "/x", Output: -1}), "exec.mounts[1].input: 1 is none of its 1 inputs"},
		{"mount input below scratch", withMount(&pb.Mount{Input: -2, Dest: "/x", Output: -1}), "exec.mounts[1].input"},
		{"mount output out of order", withMount(&pb.Mount{Dest: "/x", Output: 2}), "exec.mounts[1].output: it is 2 but stands in place of 1"},
		{"mount output below none", withMount(&pb.Mount{Dest: "/x", Output: -2}), "exec.mounts[1].output"},
		{"mount type", withMount(&pb.Mount{Input: -1, Dest: "/x", Output: -1, MountType: 99}), "exec.mounts[1].mountType: 99"},
		{"content cache", withMount(&pb.Mount{Input: -1, Dest: "/x", Output: -1, ContentCache: 99}), "exec.mounts[1].contentCache"},
		{"unsafe content cache", withMount(&pb.Mount{Dest: "/x", Selector: "s", Output: 1, ContentCache: pb.MountContentCache_ON}), "exec.mounts[1].contentCache"},
		{"result id", withMount(&pb.Mount{Dest: "/x", Output: -1, ResultID: "r"}), "exec.mounts[1].resultID"},
		{"tmpfs size", withMount(&pb.Mount{Input: -1, Dest: "/x", Output: -1, MountType: pb.MountType_TMPFS, TmpfsOpt: &pb.TmpfsOpt{Size: -1}}), "exec.mounts[1].TmpfsOpt.size"},
		{"cache without options", withMount(&pb.Mount{Input: -1, Dest: "/x", Output: -1, MountType: pb.MountType_CACHE}), "exec.mounts[1].cacheOpt"},
		{"cache sharing", withMount(&pb.Mount{Input: -1, Dest: "/x", Output: -1, MountType: pb.MountType_CACHE, CacheOpt: &pb.CacheOpt{Sharing: 9}}), "exec.mounts[1].cacheOpt.sharing"},
		{"secret without options", withMount(&pb.Mount{Input: -1, Dest: "/x", Output: -1, MountType: pb.MountType_SECRET}), "exec.mounts[1].secretOpt"},
		{"secret without id", withMount(&pb.Mount{Input: -1, Dest: "/x", Output: -1, MountType: pb.MountType_SECRET, SecretOpt: &pb.SecretOpt{}}), "exec.mounts[1].secretOpt.ID"},
		{"ssh without options", withMount(&pb.Mount{Input: -1, Dest: "/x", Output: -1, MountType: pb.MountType_SSH}), "exec.mounts[1].SSHOpt"},
		{"network mode", withExec(func(e *pb.ExecOp) { e.Network = 7 }), "exec.network: 7"},
		{"security mode", withExec(func(e *pb.ExecOp) { e.Security = 7 }), "exec.security: 7"},
		{"extra host", withExec(func(e *pb.ExecOp) { e.Meta.ExtraHosts = []*pb.HostIP{{Host: "h", IP: "x"}} }), "failed to parse IP x"},
		{"secret variable", withExec(func(e *pb.ExecOp) { e.Secretenv = []*pb.SecretEnv{{Name: "N"}} }), `secret ID missing for "N"`},
		{"empty file op", single(t, &pb.Op{Op: &pb.Op_File{File: &pb.FileOp{}}}), "file.actions"},
		{"empty file action", single(t, &pb.Op{Op: &pb.Op_File{File: &pb.FileOp{Actions: []*pb.FileAction{{}}}}}), "file.actions[0]"},
		{"merge counts", onSource(t, &pb.Op{Op: &pb.Op_Merge{Merge: &pb.MergeOp{}}}), "merge.inputs"},
		{"merge order", onSource(t, &pb.Op{Op: &pb.Op_Merge{Merge: &pb.MergeOp{Inputs: []*pb.MergeInput{{Input: 3}}}}}), "merge.inputs[0].input"},
		{"diff without sides", single(t, &pb.Op{Op: &pb.Op_Diff{Diff: &pb.DiffOp{}}}), "diff.lower"},
		{"diff without upper", single(t, &pb.Op{Op: &pb.Op_Diff{Diff: &pb.DiffOp{Lower: &pb.LowerDiffInput{Input: -1}}}}), "diff.upper"},
		{"diff counts", single(t, &pb.Op{Op: &pb.Op_Diff{Diff: &pb.DiffOp{Lower: &pb.LowerDiffInput{Input: -1}, Upper: &pb.UpperDiffInput{Input: 0}}}}), "the diff is of 1 inputs, but 0 are given"},
		{"diff order", onSource(t, &pb.Op{Op: &pb.Op_Diff{Diff: &pb.DiffOp{Lower: &pb.LowerDiffInput{Input: 5}, Upper: &pb.UpperDiffInput{Input: -1}}}}), "diff.lower.input"},
		{"passthrough without id", onSource(t, &pb.Op{Op: &pb.Op_Passthrough{Passthrough: &pb.PassthroughOp{Outputs: []int64{0}}}}), "passthrough.id"},
		{"passthrough without outputs", onSource(t, &pb.Op{Op: &pb.Op_Passthrough{Passthrough: &pb.PassthroughOp{Id: "p"}}}), "passthrough.outputs"},
		{"passthrough of nothing", onSource(t, &pb.Op{Op: &pb.Op_Passthrough{Passthrough: &pb.PassthroughOp{Id: "p", Outputs: []int64{1}}}}), "passthrough.outputs[0]"},
		{"nil locations", &pb.Definition{Def: [][]byte{nil}, Source: &pb.Source{Locations: map[string]*pb.Locations{"d": nil}}}, "source.locations[d] is nil"},
		{"nil location", &pb.Definition{Def: [][]byte{nil}, Source: &pb.Source{Locations: map[string]*pb.Locations{"d": {Locations: []*pb.Location{nil}}}}}, "source.locations[d][0] is nil"},
		{"location of no source", &pb.Definition{Def: [][]byte{nil}, Source: &pb.Source{Locations: map[string]*pb.Locations{"d": {Locations: []*pb.Location{{}}}}}}, "source index 0"},
		{"nil source info", &pb.Definition{Def: [][]byte{nil}, Source: &pb.Source{Infos: []*pb.SourceInfo{nil}}}, "source.infos[0]"},
		{"too large", &pb.Definition{Def: [][]byte{make([]byte, maxDefinition+1)}}, "the limit is"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			edge, err := newTestLoader(t, Config{}).Load(c.def, LoadOptions{})
			if err == nil {
				t.Fatalf("no error, but %v", edge)
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %q, want it to speak of %q", err, c.want)
			}
			if code := status.Code(err); code != codes.InvalidArgument {
				t.Errorf("code is %s, want InvalidArgument", code)
			}
		})
	}
}

// compat: LLB-003
func TestLoadNamesTheOp(t *testing.T) {
	b := newDef(t)
	bad := b.add(execOf(&pb.ExecOp{Meta: &pb.Meta{}}))
	_, err := newTestLoader(t, Config{}).Load(b.done(bad, 0), LoadOptions{})
	var de *DefinitionError
	if !errors.As(err, &de) {
		t.Fatalf("error is %T, want *DefinitionError", err)
	}
	if de.Op != bad || de.Field != "exec.meta.args" {
		t.Errorf("error names %s of %s, want exec.meta.args of %s", de.Field, de.Op, bad)
	}
	if !strings.Contains(err.Error(), string(bad)) {
		t.Errorf("%q doesn't name op %s", err, bad)
	}
}

func TestLoadRefusesWhatIsNotOffered(t *testing.T) {
	cases := []struct {
		name string
		op   *pb.Op
		want string
	}{
		{"scheme", sourceOf("svn://host/repo"), `scheme "svn" are not supported by this daemon (supported: docker-image, test)`},
		{"device", execOf(&pb.ExecOp{Mounts: []*pb.Mount{{Input: -1, Dest: "/"}}, CdiDevices: []*pb.CDIDevice{{Name: "v/d=1"}}}),
			`CDI device "v/d=1" is required by step "run it", but CDI device support is disabled`},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, err := newTestLoader(t, Config{}).Load(single(t, c.op), LoadOptions{})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error is %v, want it to speak of %q", err, c.want)
			}
			if code := status.Code(err); code != codes.Unimplemented {
				t.Errorf("code is %s, want Unimplemented", code)
			}
		})
	}
}

func TestLoadLeavesOutOptionalDevices(t *testing.T) {
	plain := execOf(&pb.ExecOp{})
	with := execOf(&pb.ExecOp{CdiDevices: []*pb.CDIDevice{{Name: "v/d=1", Optional: true}}})
	if a, b := cacheMapOf(t, onSource(t, plain)), cacheMapOf(t, onSource(t, with)); a.Digest != b.Digest {
		t.Errorf("an optional device that can't be had changes the key from %s to %s", a.Digest, b.Digest)
	}
}

// compat: LLB-004
func TestLoadChecksCaps(t *testing.T) {
	for _, c := range []struct {
		caps []string
		want string // "" is no error
	}{
		{[]string{string(pb.CapExecMetaBase), string(pb.CapMergeOp)}, ""},
		{[]string{string(pb.CapSourceGit), string(pb.CapSourceGitSubdir)}, ""},
		{[]string{string(pb.CapSourceGitSignatureVerify)}, "requested experimental feature source.git.signatureverify  has been disabled on the build server: signatures of git commits and tags are not verified"},
		{[]string{"exec.teleport"}, "unknown API capability exec.teleport"},
		{[]string{"z.z", "a.a", string(pb.CapExecMetaBase)}, "unknown API capability a.a"},
	} {
		b := newDef(t)
		src := b.add(sourceOf("test://base"))
		meta := &pb.OpMetadata{Caps: map[string]bool{}}
		for _, id := range c.caps {
			meta.Caps[id] = true
		}
		b.meta(src, meta)
		_, err := newTestLoader(t, Config{}).Load(b.done(src, 0), LoadOptions{})
		switch {
		case c.want == "" && err != nil:
			t.Errorf("caps %v: %v", c.caps, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), string(src))):
			t.Errorf("caps %v: error is %v, want %q of %s", c.caps, err, c.want, src)
		}
	}
}

// A definition may require whatever the daemon says that it has, and nothing
// else; what the protocol has an id for and never offers, works without.
//
// compat: LLB-C89
func TestLoadTakesWhatIsOffered(t *testing.T) {
	load := func(id string) error {
		b := newDef(t)
		src := b.add(sourceOf("test://base"))
		b.meta(src, &pb.OpMetadata{Caps: map[string]bool{id: true}})
		_, err := newTestLoader(t, Config{}).Load(b.done(src, 0), LoadOptions{})
		return err
	}
	offered := map[string]bool{}
	for _, c := range Caps() {
		offered[c.ID] = c.Enabled
		switch err := load(c.ID); {
		case c.Enabled && err != nil:
			t.Errorf("%s is offered: %v", c.ID, err)
		case !c.Enabled && (err == nil || !strings.Contains(err.Error(), c.DisabledReasonMsg)):
			t.Errorf("%s isn't offered: error %v, want %q", c.ID, err, c.DisabledReasonMsg)
		}
	}
	for _, id := range []string{string(pb.CapFileCopyModeStringFormat), string(pb.CapExecMetaRemoveMountStubsRecursive)} {
		if _, known := offered[id]; known || load(id) == nil {
			t.Errorf("%s is offered", id)
		}
	}
	stubs := execOf(&pb.ExecOp{})
	stubs.GetExec().Meta.RemoveMountStubsRecursive = true
	copied := fileTestCopy(0, 0, 0, "/a", "/b")
	copied.GetCopy().ModeStr = "u+x"
	mode := &pb.Op{Op: &pb.Op_File{File: &pb.FileOp{Actions: []*pb.FileAction{copied}}}}
	for _, op := range []*pb.Op{stubs, mode} {
		if _, err := newTestLoader(t, Config{}).Load(onSource(t, op), LoadOptions{}); err != nil {
			t.Errorf("%T: %v", op.Op, err)
		}
	}
}

// compat: LLB-005, LLB-C72
func TestLoadNormalisesPlatforms(t *testing.T) {
	src := &fakeSource{}
	l := newTestLoader(t, Config{Sources: []Source{src}})
	for _, c := range []struct {
		in   *pb.Platform
		want string
	}{
		{nil, "linux/amd64/"},
		{&pb.Platform{OS: "linux", Architecture: "aarch64", Variant: "v8"}, "linux/arm64/"},
		{&pb.Platform{OS: "Linux", Architecture: "armhf"}, "linux/arm/v7"},
		{&pb.Platform{OS: "linux", Architecture: "x86_64"}, "linux/amd64/"},
	} {
		op := sourceOf("test://base")
		op.Platform = c.in
		if _, err := l.Load(single(t, op), LoadOptions{}); err != nil {
			t.Fatal(err)
		}
		p := src.resolved[len(src.resolved)-1]
		if got := p.OS + "/" + p.Architecture + "/" + p.Variant; got != c.want {
			t.Errorf("platform %v became %s, want %s", c.in, got, c.want)
		}
	}
}

// compat: LLB-009, LLB-010, LLB-C75
func TestLoadTakesMetadata(t *testing.T) {
	b := newDef(t)
	src := b.add(sourceOf("test://base"))
	b.meta(src, &pb.OpMetadata{
		IgnoreCache:   true,
		ExportCache:   &pb.ExportCache{Value: false},
		ProgressGroup: &pb.ProgressGroup{Id: "g", Name: "group", Weak: true},
		Description:   map[string]string{customName: "fetch it", "other": "x"},
	})
	edge, err := newTestLoader(t, Config{}).Load(b.done(src, 0), LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	v := edge.Vertex
	if !v.IgnoreCache || v.ExportCache == nil || *v.ExportCache || v.Name != "fetch it" {
		t.Errorf("ignore-cache %v, export-cache %v, name %q; want true, false, %q", v.IgnoreCache, v.ExportCache, v.Name, "fetch it")
	}
	if v.Group == nil || v.Group.ID != "g" || v.Group.Name != "group" || !v.Group.Weak {
		t.Errorf("group is %+v", v.Group)
	}
}

func TestLoadNoCacheMarksEveryOp(t *testing.T) {
	edge, err := newTestLoader(t, Config{}).Load(onSource(t, execOf(&pb.ExecOp{})), LoadOptions{NoCache: true})
	if err != nil {
		t.Fatal(err)
	}
	if v := edge.Vertex; !v.IgnoreCache || !v.Inputs[0].Vertex.IgnoreCache {
		t.Error("an op isn't marked ignore-cache")
	}
}

// compat: LLB-006, LLB-C71
func TestLoadAcceptsConstraints(t *testing.T) {
	op := sourceOf("test://base")
	op.Constraints = &pb.WorkerConstraints{Filter: []string{"any==thing"}}
	if _, err := newTestLoader(t, Config{}).Load(single(t, op), LoadOptions{}); err != nil {
		t.Error(err)
	}
}

func TestLoadWantsEntitlements(t *testing.T) {
	for name, e := range map[string]*pb.ExecOp{
		"network.host":      {Network: pb.NetMode_HOST},
		"security.insecure": {Security: pb.SecurityMode_INSECURE},
	} {
		l := newTestLoader(t, Config{})
		_, err := l.Load(onSource(t, execOf(e)), LoadOptions{})
		if err == nil || !strings.Contains(err.Error(), name+" is not allowed") {
			t.Errorf("without %s: %v", name, err)
		}
		if code := status.Code(err); code != codes.PermissionDenied {
			t.Errorf("code is %s, want PermissionDenied", code)
		}
		if _, err := l.Load(onSource(t, execOf(e)), LoadOptions{Entitlements: map[string]bool{name: true}}); err != nil {
			t.Errorf("with %s: %v", name, err)
		}
	}
}

// compat: CTL-070
func TestNames(t *testing.T) {
	scratch := &pb.Mount{Input: -1, Dest: "/"}
	run := execOf(&pb.ExecOp{Meta: &pb.Meta{Args: []string{"sh", "-c", "x  y"}}, Mounts: []*pb.Mount{scratch}})
	file := &pb.Op{Op: &pb.Op_File{File: &pb.FileOp{Actions: []*pb.FileAction{
		{Output: -1, Action: &pb.FileAction_Mkdir{Mkdir: &pb.FileActionMkDir{Path: "/d"}}},
		{Output: -1, Action: &pb.FileAction_Mkfile{Mkfile: &pb.FileActionMkFile{Path: "/f"}}},
		{Output: -1, Action: &pb.FileAction_Symlink{Symlink: &pb.FileActionSymlink{Oldpath: "/o", Newpath: "/n"}}},
		{Output: -1, Action: &pb.FileAction_Rm{Rm: &pb.FileActionRm{Path: "/r"}}},
		{Output: 0, Action: &pb.FileAction_Copy{Copy: &pb.FileActionCopy{Src: "/s", Dest: "/t"}}},
	}}}}
	b := newDef(t)
	src, exec := b.add(sourceOf("test://base")), b.add(run)
	for _, c := range []struct {
		op   *pb.Op
		want string
	}{
		{sourceOf("test://base"), "test://base"},
		{run, "sh -c x  y"},
		{file, "mkdir /d, mkfile /f, symlink /n -> /o, rm /r, copy /s /t"},
		{mergeOf(input(src, 0), input(exec, 0)), "merge (test://base, sh -c x  y)"},
		{&pb.Op{Inputs: []*pb.Input{input(src, 0), input(exec, 0)}, Op: &pb.Op_Diff{Diff: &pb.DiffOp{Lower: &pb.LowerDiffInput{}, Upper: &pb.UpperDiffInput{Input: 1}}}},
			"diff (test://base) -> (sh -c x  y)"},
		{&pb.Op{Inputs: []*pb.Input{input(exec, 0)}, Op: &pb.Op_Diff{Diff: &pb.DiffOp{Lower: &pb.LowerDiffInput{Input: -1}, Upper: &pb.UpperDiffInput{}}}},
			"diff scratch -> (sh -c x  y)"},
		{&pb.Op{Inputs: []*pb.Input{input(src, 0)}, Op: &pb.Op_Passthrough{Passthrough: &pb.PassthroughOp{Id: "p7", Outputs: []int64{0}}}}, "passthrough p7"},
	} {
		n := &node{op: c.op}
		for _, in := range c.op.Inputs {
			name := map[digest.Digest]string{src: "test://base", exec: "sh -c x  y"}[digest.Digest(in.Digest)]
			n.inputs = append(n.inputs, &node{vertex: &solver.Vertex{Name: name}})
		}
		if got := n.name(); got != c.want {
			t.Errorf("name is %q, want %q", got, c.want)
		}
	}
}

// Names made of names must not grow without bound: here each would be twice as
// long as the one before.
func TestNamesStayShort(t *testing.T) {
	b := newDef(t)
	d := b.add(sourceOf("test://ü"))
	for range 200 {
		d = b.add(mergeOf(input(d, 0), input(d, 0)))
	}
	edge, err := newTestLoader(t, Config{}).Load(b.done(d, 0), LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(edge.Vertex.Name); n > maxName {
		t.Errorf("name has %d bytes", n)
	}
}

func TestLoadSharesVertices(t *testing.T) {
	b := newDef(t)
	src := b.add(sourceOf("test://base"))
	b.add(sourceOf("test://base")) // the same again
	merge := b.add(mergeOf(input(src, 0), input(src, 0)))
	edge, err := newTestLoader(t, Config{}).Load(b.done(merge, 0), LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if in := edge.Vertex.Inputs; in[0].Vertex != in[1].Vertex {
		t.Error("one op became two vertices")
	}
}

// Inputs may come after their users in the list.
func TestLoadInAnyOrder(t *testing.T) {
	b := newDef(t)
	src := b.add(sourceOf("test://base"))
	run := b.add(execOf(&pb.ExecOp{}, input(src, 0)))
	b.def.Def[0], b.def.Def[1] = b.def.Def[1], b.def.Def[0]
	edge, err := newTestLoader(t, Config{}).Load(b.done(run, 0), LoadOptions{})
	if err != nil || edge.Vertex.Digest != run {
		t.Errorf("got %v, %v", edge, err)
	}
}

// No digest can be among those that went into it, so a definition can't hold a
// cycle; should that ever change, order must not run forever.
func TestOrderRefusesCycles(t *testing.T) {
	a, b := &node{digest: "sha256:a"}, &node{digest: "sha256:b"}
	a.inputs, b.inputs = []*node{b}, []*node{a}
	if _, err := order(a); err == nil || !strings.Contains(err.Error(), "its own inputs") {
		t.Errorf("error is %v", err)
	}
}

func chain(t testing.TB, n int) *pb.Definition {
	b := newDef(t)
	d := b.add(sourceOf("test://base"))
	for i := range n {
		d = b.add(execOf(&pb.ExecOp{Meta: &pb.Meta{Args: []string{"step", fmt.Sprint(i)}}}, input(d, 0)))
	}
	return b.done(d, 0)
}

func TestLoadDeepChain(t *testing.T) {
	const n = 30_000
	edge, err := newTestLoader(t, Config{}).Load(chain(t, n), LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	depth := 0
	for v := edge.Vertex; len(v.Inputs) > 0; v = v.Inputs[0].Vertex {
		depth++
	}
	if depth != n {
		t.Errorf("depth is %d, want %d", depth, n)
	}
}

func BenchmarkLoad5000(b *testing.B) {
	def := chain(b, 5000)
	l := newTestLoader(b, Config{})
	b.ReportAllocs()
	for b.Loop() {
		if _, err := l.Load(def, LoadOptions{}); err != nil {
			b.Fatal(err)
		}
	}
}

// Of equal metadata one message is left, and each op still has its own.
func TestShareMetadata(t *testing.T) {
	meta := func(cap string) *pb.OpMetadata { return &pb.OpMetadata{Caps: map[string]bool{cap: true}} }
	def := &pb.Definition{Metadata: map[string]*pb.OpMetadata{"other": meta("exec.meta.base"), "none": nil}}
	for i := range 100 {
		def.Metadata[fmt.Sprint(i)] = meta("file.base")
	}
	ShareMetadata(def)
	messages := map[*pb.OpMetadata]bool{}
	for i := range 100 {
		m := def.Metadata[fmt.Sprint(i)]
		if !proto.Equal(m, meta("file.base")) {
			t.Fatalf("op %d has metadata %v", i, m)
		}
		messages[m] = true
	}
	if len(messages) > 3 { // the two others may come anywhere between them
		t.Errorf("there are %d messages", len(messages))
	}
	if !proto.Equal(def.Metadata["other"], meta("exec.meta.base")) || def.Metadata["none"] != nil {
		t.Errorf("the others are %v and %v", def.Metadata["other"], def.Metadata["none"])
	}
}
