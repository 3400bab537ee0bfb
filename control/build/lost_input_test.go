package build

import (
	"maps"
	"os"
	"testing"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"
)

// handOn are ops on what one is. The first ones don't look at its files: that
// these are gone is found out by who uses the result.
var handOn = map[string]*pb.Op{
	"merge":       {Op: &pb.Op_Merge{Merge: &pb.MergeOp{Inputs: []*pb.MergeInput{{Input: 0}, {Input: 1}}}}},
	"diff":        {Op: &pb.Op_Diff{Diff: &pb.DiffOp{Lower: &pb.LowerDiffInput{Input: 0}, Upper: &pb.UpperDiffInput{Input: 1}}}},
	"passthrough": {Op: &pb.Op_Passthrough{Passthrough: &pb.PassthroughOp{Id: "id", Outputs: []int64{0}}}},
	"pick":        pick("/one", "/picked"),
	"pick again":  pick("/one", "/picked-again"),
	"match":       pick("/on*", "/matched"),
}

// pick copies a file alone.
func pick(src, dest string) *pb.Op {
	return file(&pb.FileAction{Input: -1, SecondaryInput: 0, Action: &pb.FileAction_Copy{
		Copy: &pb.FileActionCopy{Src: src, Dest: dest, Mode: -1, Timestamp: 1e18, AllowWildcard: true},
	}})
}

// handedOn is the definition whose result the op named last makes of one, which
// stands on base: merged with side, or without base.
func (d *daemon) handedOn(last string) *pb.Definition {
	def := &pb.Definition{Metadata: map[string]*pb.OpMetadata{}}
	add := func(name string, op *pb.Op, inputs ...digest.Digest) digest.Digest {
		for _, in := range inputs {
			op.Inputs = append(op.Inputs, &pb.Input{Digest: string(in)})
		}
		dt, err := proto.MarshalOptions{Deterministic: true}.Marshal(op)
		d.must(err)
		def.Def = append(def.Def, dt)
		dgst := digest.FromBytes(dt)
		def.Metadata[string(dgst)] = &pb.OpMetadata{Description: map[string]string{"llb.customname": name}}
		return dgst
	}
	write := func(name string, input pb.InputIndex) *pb.Op {
		return file(&pb.FileAction{Input: int64(input), SecondaryInput: -1, Action: &pb.FileAction_Mkfile{
			Mkfile: &pb.FileActionMkFile{Path: "/" + name, Mode: 0o640, Data: []byte(name), Timestamp: 1e18},
		}})
	}
	base := add("base", &pb.Op{Op: &pb.Op_Source{Source: &pb.SourceOp{Identifier: "docker-image://" + d.reg.Host + "/base:1"}}})
	one := add("one", write("one", 0), base)
	op := proto.Clone(handOn[last]).(*pb.Op)
	switch last {
	case "merge":
		side := add("side", write("side", pb.Empty))
		add("", &pb.Op{}, add(last, op, one, side))
	case "diff":
		add("", &pb.Op{}, add(last, op, base, one))
	default:
		add("", &pb.Op{}, add(last, op, one))
	}
	return def
}

// What is lost, while it is exported, below a result that was made without a look
// at files is made again, and only that: the result itself would be lost again.
func TestLostBelow(t *testing.T) {
	for _, c := range []struct {
		last, lost string
		ran        map[string]int
	}{
		{"merge", "base", map[string]int{"one": 2, "side": 1, "merge": 2}},
		{"merge", "one", map[string]int{"one": 2, "side": 1, "merge": 2}},
		{"merge", "side", map[string]int{"one": 1, "side": 2, "merge": 2}},
		{"passthrough", "base", map[string]int{"one": 2, "passthrough": 2}},
		{"passthrough", "one", map[string]int{"one": 2, "passthrough": 2}},
		{"diff", "base", map[string]int{"one": 2, "diff": 2}}, // a layer is packed with a look at what is below
		{"diff", "one", map[string]int{"one": 2, "diff": 2}},
	} {
		t.Run(c.last+" "+c.lost, func(t *testing.T) {
			d := newDaemon(t)
			def := d.handedOn(c.last)
			got := d.run(def, "x:1", trouble{exporting: func() {
				d.must(os.RemoveAll(d.snapshotOf(c.lost)))
				d.damageBlobs(func(path string) { d.must(os.Remove(path)) })()
			}})
			want := d.run(def, "x:1", trouble{})
			delete(want.ran, "base")
			if len(want.ran) > 0 || !maps.Equal(got.files, want.files) {
				t.Errorf("got %v, later %v, which ran %v", got.files, want.files, want.ran)
			}
			delete(got.ran, "base") // a source only says where it is, each time
			if !maps.Equal(got.ran, c.ran) {
				t.Errorf("executed %v, want %v", got.ran, c.ran)
			}
		})
	}
}

// A file that a copy doesn't find, although its digest is known, makes the step
// that wrote it run again.
func TestLostFileIsCopied(t *testing.T) {
	for _, again := range []string{"pick again", "match"} {
		d := newDaemon(t)
		d.run(d.handedOn("pick"), "x:1", trouble{})
		d.damageFile("one", func(path string) { d.must(os.Remove(path)) })()
		got := d.run(d.handedOn(again), "x:1", trouble{})
		if len(got.files) != 1 || got.ran["one"] != 1 || got.ran[again] != 1 {
			t.Errorf("%s: got %v, executed %v", again, got.files, got.ran)
		}
	}
}
