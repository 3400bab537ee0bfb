package ops

import (
	"fmt"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
)

// compat: LLB-082
func TestNestedIsChecked(t *testing.T) {
	of := func(input int64) map[string]*pb.BuildInput {
		return map[string]*pb.BuildInput{pb.LLBDefinitionInput: {Input: input}}
	}
	for _, c := range []struct {
		op     *pb.BuildOp
		inputs int
		want   string
	}{
		{nil, 1, "build: it is missing"},
		{&pb.BuildOp{Inputs: of(0)}, 1, "build.builder: it is 0; only -1 is allowed"},
		{&pb.BuildOp{Builder: -1}, 1, "none is named buildkit.llb.definition"},
		{&pb.BuildOp{Builder: -1, Inputs: map[string]*pb.BuildInput{pb.LLBDefinitionInput: nil}}, 1, "none is named"},
		{&pb.BuildOp{Builder: -1, Inputs: of(1)}, 1, "1 is none of its 1 inputs"},
		{&pb.BuildOp{Builder: -1, Inputs: of(-1)}, 1, "-1 is none of its 1 inputs"},
		{&pb.BuildOp{Builder: -1, Inputs: of(0)}, 0, "0 is none of its 0 inputs"},
	} {
		if _, err := checkNested(c.op, c.inputs); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: error %v; want %s", c.op, err, c.want)
		}
	}
	if n, err := checkNested(&pb.BuildOp{Builder: -1, Inputs: of(1)}, 2); n != 1 || err != nil {
		t.Errorf("%d outputs, error %v", n, err)
	}
	_, err := newTestLoader(t, Config{}).Load(onSource(t, &pb.Op{Op: &pb.Op_Build{Build: &pb.BuildOp{Builder: -1, Inputs: of(0)}}}), LoadOptions{})
	if err == nil || !strings.Contains(err.Error(), "can't be solved inside") {
		t.Errorf("without anybody to solve it: error %v", err)
	}
}

// A build that would wait for itself is refused instead.
func TestNesting(t *testing.T) {
	on := func(name string, inputs ...*solver.Vertex) *solver.Vertex {
		v := &solver.Vertex{Digest: digest.Digest(name), Op: &nestedOp{}}
		if strings.HasPrefix(name, "step") {
			v.Op = &mergeOp{}
		}
		for _, in := range inputs {
			v.Inputs = append(v.Inputs, solver.Edge{Vertex: in})
		}
		return v
	}
	var n nesting
	shared := on("step")
	for _, ok := range []struct {
		outer  digest.Digest
		target *solver.Vertex
	}{{"a", on("b", shared, shared)}, {"a", on("b", shared)}, {"b", on("step2", on("c"))}, {"d", on("c")}, {"e", shared}} {
		if err := n.enter(ok.outer, ok.target); err != nil {
			t.Errorf("%s: %v", ok.outer, err)
		}
	}
	for _, v := range []*solver.Vertex{on("c"), on("a"), on("step3", on("step4"), on("b"))} {
		if err := n.enter("c", v); err == nil || !strings.Contains(err.Error(), "op c: it is among its own steps") {
			t.Errorf("%v: error %v", v, err)
		}
	}

	n = nesting{}
	var err error
	depth := 0
	for ; err == nil && depth < 100; depth++ {
		err = n.enter(digest.Digest(fmt.Sprint(depth)), on(fmt.Sprint(depth+1)))
	}
	if depth != maxNesting+1 || err == nil || !strings.Contains(err.Error(), "deeper than 32") {
		t.Errorf("%d deep: error %v", depth, err)
	}
}
