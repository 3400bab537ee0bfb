package ops

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// mutations calls fn with every message that differs from m in one value, at
// whatever depth.
func mutations(m proto.Message, fn func(what string, changed proto.Message)) {
	var walk func(at string, get func(root proto.Message) protoreflect.Message)
	walk = func(at string, get func(proto.Message) protoreflect.Message) {
		fields := get(m).Descriptor().Fields()
		for i := range fields.Len() {
			fd := fields.Get(i)
			name := at + "." + string(fd.Name())
			switch {
			case fd.IsList():
				for j := range get(m).Get(fd).List().Len() {
					if fd.Kind() == protoreflect.MessageKind {
						walk(fmt.Sprintf("%s[%d]", name, j), func(root proto.Message) protoreflect.Message {
							return get(root).Mutable(fd).List().Get(j).Message()
						})
						continue
					}
					c := proto.Clone(m)
					list := get(c).Mutable(fd).List()
					list.Set(j, otherValue(fd, list.Get(j)))
					fn(fmt.Sprintf("%s[%d]", name, j), c)
				}
			case fd.Kind() == protoreflect.MessageKind:
				if get(m).Has(fd) {
					walk(name, func(root proto.Message) protoreflect.Message { return get(root).Mutable(fd).Message() })
				}
			case fd.ContainingOneof() != nil && !get(m).Has(fd):
			default:
				c := proto.Clone(m)
				get(c).Set(fd, otherValue(fd, get(c).Get(fd)))
				fn(name, c)
			}
		}
	}
	walk("", func(root proto.Message) protoreflect.Message { return root.ProtoReflect() })
}

func otherValue(fd protoreflect.FieldDescriptor, v protoreflect.Value) protoreflect.Value {
	switch fd.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(v.String() + "x")
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes(append(slices.Clone(v.Bytes()), 'x'))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(!v.Bool())
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum((v.Enum() + 1) % protoreflect.EnumNumber(fd.Enum().Values().Len()))
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(int32(v.Int()) + 1)
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(uint32(v.Uint()) + 1)
	}
	return protoreflect.ValueOfInt64(v.Int() + 1)
}

// sameFacetsAsKey checks that facets tell a step from another exactly where its
// key does, and returns how many keys differed.
func sameFacetsAsKey(t *testing.T, m proto.Message, op func(proto.Message) solver.Op) (differed int) {
	t.Helper()
	fingerprint := func(m proto.Message) (string, []Facet) {
		o := op(m)
		cm, _, err := o.CacheMap(context.Background(), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		key := string(cm.Digest)
		for _, d := range cm.Deps { // what is selected of inputs
			key += string(d.Selector)
		}
		return string(cm.Digest), Facets(&solver.Vertex{Op: o})
	}
	key, facets := fingerprint(m)
	mutations(m, func(what string, changed proto.Message) {
		k, f := fingerprint(changed)
		if (k == key) != slices.Equal(f, facets) {
			t.Errorf("%s: keys equal %v, facets equal %v:\n%+v\n%+v", what, k == key, slices.Equal(f, facets), facets, f)
		}
		if k != key {
			differed++
		}
	})
	names := map[string]bool{}
	for _, f := range facets {
		if names[f.Name] {
			t.Errorf("there are two facets %q", f.Name)
		}
		names[f.Name] = true
	}
	return differed
}

// Every value of an exec op that enters its key is in a facet, and no other.
func TestExecFacets(t *testing.T) {
	op := &pb.ExecOp{
		Meta: &pb.Meta{
			Args: []string{"sh", "-c", "make"}, Env: []string{"A=1", "B=2", "A=3"}, Cwd: "/src", User: "me", Hostname: "h",
			ExtraHosts: []*pb.HostIP{{Host: "a", IP: "1.2.3.4"}}, Ulimit: []*pb.Ulimit{{Name: "nofile", Soft: 1, Hard: 2}},
			CgroupParent: "c", ValidExitCodes: []int32{1}, ProxyEnv: &pb.ProxyEnv{HttpProxy: "p"},
		},
		Mounts: []*pb.Mount{
			{Dest: "/"}, {Dest: "/in", Input: 1, Readonly: true, Output: -1, Selector: "/sub"},
			{Dest: "/cache", Input: -1, Output: -1, MountType: pb.MountType_CACHE, CacheOpt: &pb.CacheOpt{ID: "/cache"}},
			{Dest: "/own", Input: -1, Output: -1, MountType: pb.MountType_CACHE, CacheOpt: &pb.CacheOpt{ID: "mine"}},
			{Dest: "/tmp", Input: -1, Output: -1, MountType: pb.MountType_TMPFS, TmpfsOpt: &pb.TmpfsOpt{Size: 1}},
			{Dest: "/s", Input: -1, Output: -1, MountType: pb.MountType_SECRET, SecretOpt: &pb.SecretOpt{ID: "s"}},
			{Dest: "/s", Input: -1, Output: -1, MountType: pb.MountType_SSH, SSHOpt: &pb.SSHOpt{ID: "ssh"}},
		},
		Secretenv:  []*pb.SecretEnv{{ID: "id", Name: "TOKEN"}},
		CdiDevices: []*pb.CDIDevice{{Name: "gpu"}},
	}
	exec := func(m proto.Message) solver.Op {
		return &execOp{vertex: vertex{pb: &pb.Op{Inputs: make([]*pb.Input, 9)}, platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}}, op: m.(*pb.ExecOp)}
	}
	if n := sameFacetsAsKey(t, op, exec); n < 50 {
		t.Errorf("only %d values enter the key", n)
	}
	// The usual step, whose mounts aren't in the key.
	plain := &pb.ExecOp{Meta: &pb.Meta{Args: []string{"make"}}, Mounts: []*pb.Mount{{Dest: "/"}}}
	if n := sameFacetsAsKey(t, plain, exec); n < 10 {
		t.Errorf("only %d values enter the key", n)
	}
}

// The platform is outside the op.
func TestPlatformIsAFacet(t *testing.T) {
	at := func(p ocispec.Platform) []Facet {
		return (&execOp{vertex: vertex{platform: p}, op: &pb.ExecOp{Meta: &pb.Meta{}}}).facets()
	}
	base := ocispec.Platform{OS: "linux", Architecture: "arm64"}
	for _, p := range []ocispec.Platform{
		{OS: "linux", Architecture: "amd64"}, {OS: "windows", Architecture: "arm64"},
		{OS: "linux", Architecture: "arm64", Variant: "v8"}, {OS: "linux", Architecture: "arm64", OSVersion: "1"},
		{OS: "linux", Architecture: "arm64", OSFeatures: []string{"x"}},
	} {
		if slices.Equal(at(base), at(p)) {
			t.Errorf("%+v has the facets of %+v", p, base)
		}
	}
}

// Every value of a file op that enters its key is in a facet, and no other.
func TestFileFacets(t *testing.T) {
	byName := func(input int64, name string) *pb.UserOpt {
		return &pb.UserOpt{User: &pb.UserOpt_ByName{ByName: &pb.NamedUserOpt{Name: name, Input: input}}}
	}
	op := &pb.FileOp{Actions: []*pb.FileAction{
		{SecondaryInput: 1, Output: -1, Action: &pb.FileAction_Copy{Copy: &pb.FileActionCopy{
			Src: "/a/b", Dest: "/c", Mode: 0o600, ModeStr: "u+x", Timestamp: 3, IncludePatterns: []string{"i"}, ExcludePatterns: []string{"e"},
			RequiredPaths: []string{"r"}, Owner: &pb.ChownOpt{User: byName(0, "me"), Group: &pb.UserOpt{User: &pb.UserOpt_ByID{ByID: 7}}},
		}}},
		{Input: 2, SecondaryInput: -1, Output: -1, Action: &pb.FileAction_Mkfile{Mkfile: &pb.FileActionMkFile{Path: "/f", Data: []byte("d"), Timestamp: 3}}},
		{Input: 3, SecondaryInput: -1, Output: -1, Action: &pb.FileAction_Mkdir{Mkdir: &pb.FileActionMkDir{Path: "/d", Timestamp: 3}}},
		{Input: 4, SecondaryInput: -1, Output: -1, Action: &pb.FileAction_Symlink{Symlink: &pb.FileActionSymlink{Oldpath: "/o", Newpath: "/n", Timestamp: 3}}},
		{Input: 5, SecondaryInput: -1, Output: 0, Action: &pb.FileAction_Rm{Rm: &pb.FileActionRm{Path: "/x"}}},
	}}
	n := sameFacetsAsKey(t, op, func(m proto.Message) solver.Op {
		return &fileOp{vertex: vertex{pb: &pb.Op{Inputs: make([]*pb.Input, 2)}}, op: m.(*pb.FileOp), inputs: 2}
	})
	if n < 45 {
		t.Errorf("only %d values enter the key", n)
	}
}

func TestMergeAndDiffFacets(t *testing.T) {
	sameFacetsAsKey(t, &pb.MergeOp{Inputs: []*pb.MergeInput{{Input: 0}, {Input: 1}}}, func(m proto.Message) solver.Op {
		return &mergeOp{vertex: vertex{pb: &pb.Op{}}, op: m.(*pb.MergeOp)}
	})
	sameFacetsAsKey(t, &pb.DiffOp{Lower: &pb.LowerDiffInput{Input: 0}, Upper: &pb.UpperDiffInput{Input: 1}}, func(m proto.Message) solver.Op {
		return &diffOp{vertex: vertex{pb: &pb.Op{}}, op: m.(*pb.DiffOp)}
	})
}
