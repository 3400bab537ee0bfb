package ops

import (
	"context"
	"errors"
	"testing"

	"github.com/moby/buildkit/solver/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

// FuzzLoad feeds Load definitions that nobody checked. It must answer with an
// error or a graph whose target can say what it is. What is fuzzed is taken as
// a definition, and as one op in a definition that is sound otherwise: changed
// at random, a digest names nothing any more.
func FuzzLoad(f *testing.F) {
	seed := func(m proto.Message) {
		dt, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(dt)
	}
	for _, c := range goldenCases() {
		seed(c.op)
	}
	seed(sourceOf("nowhere://x"))
	seed(&pb.Op{Op: &pb.Op_Build{Build: &pb.BuildOp{Def: chain(f, 1)}}})
	seed(&pb.Op{Op: &pb.Op_File{File: &pb.FileOp{Actions: []*pb.FileAction{{Input: -1, SecondaryInput: -1, Action: &pb.FileAction_Mkdir{Mkdir: &pb.FileActionMkDir{Path: "/d"}}}}}}})
	seed(chain(f, 3))
	seed(single(f, sourceOf("test://x")))

	l := newTestLoader(f, Config{Sources: []Source{&fakeSource{key: func(int) (string, bool, error) { return "k", false, nil }}}})
	f.Fuzz(func(t *testing.T, raw []byte) {
		def := &pb.Definition{}
		if proto.Unmarshal(raw, def) == nil {
			mustAnswer(t, l, def)
		}
		op := &pb.Op{}
		if proto.Unmarshal(raw, op) == nil {
			b := newDef(t)
			src := b.add(sourceOf("test://base"))
			for _, in := range op.Inputs {
				in.Digest = string(src)
			}
			mustAnswer(t, l, b.done(b.add(op), 0))
		}
	})
}

func mustAnswer(t *testing.T, l *Loader, def *pb.Definition) {
	edge, err := l.Load(def, LoadOptions{Entitlements: map[string]bool{entitlementInsecure: true, entitlementNetworkHost: true}})
	if err != nil {
		var de *DefinitionError
		if !errors.As(err, &de) || de.Code == codes.OK || err.Error() == "" {
			t.Errorf("the error is %T: %v", err, err)
		}
		return
	}
	if edge.Vertex == nil {
		return
	}
	m, _, err := edge.Vertex.Op.CacheMap(context.Background(), asker{}, 0)
	if err != nil {
		t.Fatalf("an op that was loaded has no cache map: %v", err)
	}
	if len(m.Deps) != len(edge.Vertex.Inputs) {
		t.Fatalf("%d deps for %d inputs", len(m.Deps), len(edge.Vertex.Inputs))
	}
}
