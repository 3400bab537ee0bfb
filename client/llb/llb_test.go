package llb

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"
)

func marshalled(t *testing.T, st State, opts ...ConstraintsOpt) *pb.Definition {
	t.Helper()
	def, err := st.Marshal(append([]ConstraintsOpt{LinuxAmd64}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	return def
}

func TestEnvList(t *testing.T) {
	e := EnvList{}.AddOrReplace("A", "1").AddOrReplace("B", "2")
	moved := e.AddOrReplace("A", "3").SetDefault("B", "x").SetDefault("C", "4")
	if got := strings.Join(moved.ToArray(), " "); got != "B=2 A=3 C=4" {
		t.Errorf("got %s", got)
	}
	if got := strings.Join(moved.Delete("A").Keys(), " "); got != "B C" {
		t.Errorf("after delete: %s", got)
	}
	if v, ok := e.Get("A"); v != "1" || !ok {
		t.Errorf("the first list changed: %q, %v", v, ok)
	}
	if _, ok := e.Get("C"); ok {
		t.Error("C leaked into the first list")
	}
}

func TestStatesAreValues(t *testing.T) {
	base := Scratch().Dir("/a").AddUlimit("nofile", 1, 1)
	left, right := base.Dir("l").AddUlimit("core", 2, 2), base.Dir("../r").AddUlimit("cpu", 3, 3)
	for _, tc := range []struct{ got, want string }{
		{base.GetDir(), "/a"}, {left.GetDir(), "/a/l"}, {right.GetDir(), "/r"},
		{left.ulimits[1].Name, "core"}, {right.ulimits[1].Name, "cpu"},
	} {
		if tc.got != tc.want {
			t.Errorf("got %q, want %q", tc.got, tc.want)
		}
	}
}

// Equal ops are written once, inputs before what uses them, the target last.
func TestDefinitionOrder(t *testing.T) {
	same := func() State { return Image("busybox").File(Mkdir("/x", 0o755)) }
	def := marshalled(t, Merge([]State{same(), same().File(Mkdir("/y", 0o755))}, WithCustomName("m")))
	if len(def.Def) != 5 {
		t.Fatalf("%d ops, want 5", len(def.Def))
	}
	seen := map[string]bool{}
	for _, dt := range def.Def {
		var op pb.Op
		if err := op.UnmarshalVT(dt); err != nil {
			t.Fatal(err)
		}
		for _, in := range op.Inputs {
			if !seen[in.Digest] {
				t.Errorf("input %s comes after its use", in.Digest)
			}
		}
		seen[digest.FromBytes(dt).String()] = true
	}
	head, err := Head(def)
	if err != nil {
		t.Fatal(err)
	}
	if got := def.Metadata[head.String()].Description["llb.customname"]; got != "m" {
		t.Errorf("target is called %q", got)
	}
	again := marshalled(t, Merge([]State{same(), same().File(Mkdir("/y", 0o755))}, WithCustomName("m")))
	if !proto.Equal(def, again) {
		t.Error("marshalling twice differs")
	}
}

func TestMetadataOfEqualOpsIsJoined(t *testing.T) {
	a := Image("busybox", WithCustomName("a"))
	b := Image("busybox", WithDescription(map[string]string{"k": "v"}), IgnoreCache, WithExportCache(), ProgressGroup("g", "group", true))
	def := marshalled(t, Scratch().File(Copy(a, "/", "/").Copy(b, "/", "/")))
	md := def.Metadata[digest.FromBytes(def.Def[0]).String()]
	if md.Description["llb.customname"] != "a" || md.Description["k"] != "v" || !md.IgnoreCache || !md.ExportCache.GetValue() || md.ProgressGroup.GetName() != "group" {
		t.Errorf("metadata %v", md)
	}
	last := def.Metadata[digest.FromBytes(def.Def[len(def.Def)-1]).String()]
	for _, c := range []string{"constraints", "platform", "meta.ignorecache", "meta.description", "meta.exportcache"} {
		if !last.Caps[c] {
			t.Errorf("the definition doesn't demand %s", c)
		}
	}
}

func TestScratchIsEmpty(t *testing.T) {
	for name, st := range map[string]State{
		"scratch":            Scratch(),
		"merge of scratch":   Merge([]State{Scratch(), Scratch()}),
		"diff of scratch":    Diff(Scratch(), Scratch()),
		"deferred scratch":   Defer(func() (State, error) { return Scratch(), nil }),
		"zero":               {},
		"tail of read-only":  Image("x").Run(Args([]string{"x"})).AddMount("/y", Scratch(), Readonly),
		"requires nothing":   Scratch().Requires("id", nil),
		"reset":              Scratch().Reset(Image("busybox")),
		"unmounted":          Image("x").Run(Args([]string{"x"})).GetMount("/nothing"),
		"without definition": mustFrom(t, &pb.Definition{}),
	} {
		if def := marshalled(t, st); len(def.Def) != 0 {
			t.Errorf("%s: %d ops", name, len(def.Def))
		}
	}
}

func mustFrom(t *testing.T, def *pb.Definition) State {
	t.Helper()
	st, err := FromDefinition(def)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func TestDefer(t *testing.T) {
	asked := 0
	st := Defer(func() (State, error) { asked++; return Image("busybox"), nil })
	def := marshalled(t, Scratch().File(Copy(st, "/a", "/b").Copy(st, "/c", "/d")))
	if asked != 1 || len(def.Def) != 3 {
		t.Errorf("asked %d times, %d ops", asked, len(def.Def))
	}
	boom := errors.New("boom")
	failing := Defer(func() (State, error) { return State{}, boom })
	if _, err := Scratch().File(Copy(failing, "/", "/")).Marshal(); !errors.Is(err, boom) {
		t.Errorf("got %v", err)
	}
}

func TestMistakes(t *testing.T) {
	bb := Image("busybox")
	for want, st := range map[string]State{
		"needs arguments":          bb.Run(Shlex(`echo "open`)).Root(),
		"needs a working":          State{}.WithOutput(bb).Run(Args([]string{"x"})).Root(),
		"keeps nothing":            bb.Run(Args([]string{"x"})).AddMount("/t", Scratch(), Tmpfs(0)),
		"can't start from another": bb.Run(Args([]string{"x"}), AddMount("/t", bb, Tmpfs(0))).Root(),
		"image reference":          Image("UPPER//x"),
		"digest is needed":         ImageBlob("busybox"),
		"tag is not allowed":       OCILayoutBlob("busybox:tag@" + emptyDigest),
		"nothing to copy from":     bb.File(Copy(nil, "/", "/")),
		"needs an action":          bb.File(nil),
		"an id is needed":          bb.Requires("", []State{bb}),
		"identifier can't be":      Source("", nil),
		"not a git repository":     Git("ftp://example.com/x.git", ""),
	} {
		if _, err := st.Marshal(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

func TestSourceMap(t *testing.T) {
	file := &SourceMap{Filename: "Dockerfile", Language: "Dockerfile", Data: []byte("FROM x\n")}
	twin := &SourceMap{Filename: "Dockerfile", Language: "Dockerfile", Data: []byte("FROM x\n")}
	at := func(l int32) []*pb.Range { return []*pb.Range{{Start: &pb.Position{Line: l}}} }
	var none *SourceMap
	st := Image("x", file.Location(at(1))).File(Mkdir("/a", 0o755), twin.Location(at(2)), file.Location(at(3)), none.Location(at(4)))
	def := marshalled(t, st)
	if len(def.Source.Infos) != 1 || string(def.Source.Infos[0].Data) != "FROM x\n" {
		t.Errorf("infos %v", def.Source.Infos)
	}
	var lines []int32
	for _, l := range def.Source.Locations[digest.FromBytes(def.Def[1]).String()].Locations {
		lines = append(lines, l.Ranges[0].Start.Line)
	}
	if !slices.Equal(lines, []int32{2, 3}) {
		t.Errorf("locations at lines %v", lines)
	}
}

// A definition that was built before is part of a new one byte for byte.
func TestFromDefinition(t *testing.T) {
	file := &SourceMap{Filename: "f"}
	inner := Image("busybox", file.Location(nil)).Run(Args([]string{"a"}), IgnoreCache).AddMount("/out", Scratch())
	def := marshalled(t, inner)
	st := mustFrom(t, def)
	if p := st.GetPlatform(); p == nil || p.Architecture != "amd64" {
		t.Errorf("platform %v", p)
	}
	if !proto.Equal(marshalled(t, st), def) {
		t.Error("the definition changed on the way")
	}
	direct, included := Scratch().File(Copy(inner, "/", "/")), Scratch().File(Copy(st, "/", "/"))
	if !proto.Equal(marshalled(t, direct), marshalled(t, included)) {
		t.Error("building on a definition differs from building on its state")
	}

	var buf bytes.Buffer
	if err := WriteTo(def, &buf); err != nil {
		t.Fatal(err)
	}
	back, err := ReadFrom(&buf)
	if err != nil || !proto.Equal(back, def) {
		t.Errorf("write and read: %v", err)
	}
}

func TestFromBrokenDefinition(t *testing.T) {
	def := marshalled(t, Image("busybox").File(Mkdir("/x", 0o755)))
	missing := &pb.Definition{Def: def.Def[len(def.Def)-1:]}
	locations := proto.Clone(def).(*pb.Definition)
	locations.Source = &pb.Source{Locations: map[string]*pb.Locations{
		digest.FromBytes(def.Def[0]).String(): {Locations: []*pb.Location{{SourceIndex: 7}}},
	}}
	for name, bad := range map[string]*pb.Definition{
		"garbage":         {Def: [][]byte{{0xff}}},
		"no input":        {Def: [][]byte{{}}},
		"missing target":  missing,
		"garbage before":  {Def: [][]byte{{0xff}, def.Def[len(def.Def)-1]}},
		"unknown source":  locations,
		"negative output": {Def: [][]byte{mustOp(t, &pb.Op{Inputs: []*pb.Input{{Digest: "x", Index: -1}}})}},
	} {
		st, err := FromDefinition(bad)
		if err == nil {
			_, err = st.Marshal()
		}
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func mustOp(t *testing.T, op *pb.Op) []byte {
	t.Helper()
	dt, err := op.MarshalVT()
	if err != nil {
		t.Fatal(err)
	}
	return dt
}

func FuzzFromDefinition(f *testing.F) {
	def, err := Image("busybox").Run(Args([]string{"x"})).Marshal(LinuxAmd64)
	if err != nil {
		f.Fatal(err)
	}
	var buf bytes.Buffer
	if err := WriteTo(def, &buf); err != nil {
		f.Fatal(err)
	}
	f.Add(buf.Bytes())
	f.Fuzz(func(t *testing.T, dt []byte) {
		def, err := ReadFrom(bytes.NewReader(dt))
		if err != nil {
			return
		}
		if st, err := FromDefinition(def); err == nil {
			// Only the absence of a panic matters; any error is fine.
			_, _ = Scratch().File(Copy(st, "/", "/")).Marshal()
		}
	})
}
