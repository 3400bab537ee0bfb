package ops

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/moby/buildkit/solver/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// definitionOf marshals ops, the last of which points to the result. Inputs name
// ops by their number, as in "#0".
func definitionOf(t *testing.T, ops ...*pb.Op) *pb.Definition {
	t.Helper()
	def := &pb.Definition{Metadata: map[string]*pb.OpMetadata{}, Source: &pb.Source{Locations: map[string]*pb.Locations{}}}
	def.Source.Infos = []*pb.SourceInfo{{Filename: "f"}}
	var digests []string
	for i, op := range ops {
		for _, in := range op.Inputs {
			in.Digest = digests[in.Digest[1]-'0']
		}
		raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(op)
		if err != nil {
			t.Fatal(err)
		}
		dgst := string(digestOf(raw))
		digests, def.Def = append(digests, dgst), append(def.Def, raw)
		def.Metadata[dgst] = &pb.OpMetadata{Description: map[string]string{"n": string(rune('0' + i))}}
		def.Source.Locations[dgst] = &pb.Locations{Locations: []*pb.Location{{Ranges: []*pb.Range{{Start: &pb.Position{Line: int32(i)}}}}}}
	}
	return def
}

func inputsOf(names ...string) (out []*pb.Input) {
	for _, n := range names {
		out = append(out, &pb.Input{Digest: n})
	}
	return out
}

func sourceNamed(id string) *pb.Op {
	return &pb.Op{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: id}}}
}

func mergeOpOf(inputs ...string) *pb.Op {
	m := &pb.MergeOp{}
	for i := range inputs {
		m.Inputs = append(m.Inputs, &pb.MergeInput{Input: int64(i)})
	}
	return &pb.Op{Inputs: inputsOf(inputs...), Op: &pb.Op_Merge{Merge: m}}
}

// A changed source gives all that stand on it other digests, under which they
// have their metadata and locations; what doesn't keeps its own. compat: LLB-002
func TestRewrite(t *testing.T) {
	ctx := context.Background()
	def := definitionOf(t, sourceNamed("local://a"), sourceNamed("local://b"), mergeOpOf("#0", "#1"), mergeOpOf("#1", "#1"), mergeOpOf("#2", "#3"), &pb.Op{Inputs: inputsOf("#4")})
	same, err := Rewrite(ctx, def, func(context.Context, *pb.Op) (bool, error) { return false, nil })
	if err != nil || same != def {
		t.Fatalf("unchanged: %v, error %v", same, err)
	}
	var mu sync.Mutex
	asked := map[string]int{}
	got, err := Rewrite(ctx, def, func(_ context.Context, op *pb.Op) (bool, error) {
		mu.Lock()
		defer mu.Unlock()
		src := op.GetSource()
		asked[src.Identifier]++
		if src.Identifier != "local://a" {
			return false, nil
		}
		src.Identifier = "local://c"
		return true, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(asked) != 2 || asked["local://a"] != 1 || asked["local://b"] != 1 {
		t.Errorf("asked about %v", asked)
	}
	want := definitionOf(t, sourceNamed("local://c"), sourceNamed("local://b"), mergeOpOf("#0", "#1"), mergeOpOf("#1", "#1"), mergeOpOf("#2", "#3"), &pb.Op{Inputs: inputsOf("#4")})
	if len(got.Def) != len(want.Def) {
		t.Fatalf("%d ops; want %d", len(got.Def), len(want.Def))
	}
	has := map[string]bool{}
	for _, raw := range got.Def {
		has[string(raw)] = true
	}
	for i, raw := range want.Def {
		dgst := string(digestOf(raw))
		if !has[string(raw)] {
			t.Errorf("op %d isn't there", i)
		}
		if i == len(want.Def)-1 {
			continue
		}
		if !proto.Equal(got.Metadata[dgst], want.Metadata[dgst]) || !proto.Equal(got.Source.Locations[dgst], want.Source.Locations[dgst]) {
			t.Errorf("op %d: metadata %v, locations %v", i, got.Metadata[dgst], got.Source.Locations[dgst])
		}
	}
	if n := len(got.Metadata); n != len(want.Def)-1 {
		t.Errorf("metadata of %d ops", n)
	}
	if _, _, err := parse(got); err != nil {
		t.Errorf("the definition that came of it: %v", err)
	}

	// Two sources may become one.
	got, err = Rewrite(ctx, def, func(_ context.Context, op *pb.Op) (bool, error) {
		op.GetSource().Identifier = "local://c"
		return true, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if target, _, err := parse(got); err != nil || target.inputs[0].inputs[0] != target.inputs[0].inputs[1] {
		t.Errorf("two sources became one: error %v", err)
	}
}

// What is refused is refused as the op of its line. compat: LLB-012
func TestRewriteRefuses(t *testing.T) {
	def := definitionOf(t, sourceNamed("local://a"), &pb.Op{Inputs: inputsOf("#0")})
	_, err := Rewrite(context.Background(), def, func(context.Context, *pb.Op) (bool, error) {
		return false, status.Error(codes.PermissionDenied, "no")
	})
	fault := (*DefinitionError)(nil)
	if !errors.As(err, &fault) || fault.Op != digestOf(def.Def[0]) || fault.Code != codes.PermissionDenied || !strings.Contains(err.Error(), "no") {
		t.Errorf("error %v", err)
	}
	if _, err := Rewrite(context.Background(), &pb.Definition{Def: [][]byte{{1}, {2}}}, nil); err == nil {
		t.Error("a definition that can't be read is rewritten")
	}
}
