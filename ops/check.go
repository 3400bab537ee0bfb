package ops

import (
	"errors"
	"fmt"
	"slices"

	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/apicaps"
	"google.golang.org/grpc/codes"
)

// known are the capabilities that definitions may demand.
var known = pb.Caps.CapSet(Caps())

// checkCaps refuses an op that demands a capability which this daemon doesn't
// know or has disabled (LLB-004), in a fixed order.
func checkCaps(meta *pb.OpMetadata) error {
	if meta == nil {
		return nil
	}
	var missing []string
	for id := range meta.Caps {
		if known.Supports(apicaps.CapID(id)) != nil {
			missing = append(missing, id)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	slices.Sort(missing)
	return &DefinitionError{Field: "caps", Code: codes.InvalidArgument, Err: known.Supports(apicaps.CapID(missing[0]))}
}

// check refuses an op whose body can't be what it says, so that the rest of
// the package needs not ask again (LLB-003). outputs is how many it has.
func check(op *pb.Op) (outputs int, err error) {
	inputs := len(op.Inputs)
	switch x := op.Op.(type) {
	case *pb.Op_Source:
		return 1, checkSource(x.Source, inputs)
	case *pb.Op_Exec:
		return checkExec(x.Exec, inputs)
	case *pb.Op_File:
		return checkFile(x.File)
	case *pb.Op_Merge:
		return 1, checkMerge(x.Merge, inputs)
	case *pb.Op_Diff:
		return 1, checkDiff(x.Diff, inputs)
	case *pb.Op_Passthrough:
		return checkPassthrough(x.Passthrough, inputs)
	case *pb.Op_Build:
		return checkNested(x.Build, inputs)
	case nil:
		return 0, invalid("", "it has no body, or one of a kind that this daemon doesn't know")
	}
	return 0, unsupported("", "ops of kind %T are not supported by this daemon", op.Op)
}

func checkSource(op *pb.SourceOp, inputs int) error {
	if op == nil {
		return invalid("source", "it is missing")
	}
	if inputs != 0 {
		return invalid("inputs", "a source has no inputs, but %d are given", inputs)
	}
	return nil
}

// checkFile counts the outputs; what actions need of one another is their plan's to
// check.
func checkFile(op *pb.FileOp) (outputs int, err error) {
	if op == nil {
		return 0, invalid("file", "it is missing")
	}
	if len(op.Actions) == 0 {
		return 0, invalid("file.actions", "a file op needs at least one action")
	}
	for i, a := range op.Actions {
		if a.GetMkdir() == nil && a.GetMkfile() == nil && a.GetSymlink() == nil && a.GetRm() == nil && a.GetCopy() == nil {
			return 0, invalid(fmt.Sprintf("file.actions[%d]", i), "it is missing, or has no body of a kind that this daemon knows")
		}
		if a.Output != int64(pb.SkipOutput) {
			outputs++
		}
	}
	return outputs, nil
}

func checkMerge(op *pb.MergeOp, inputs int) error {
	if op == nil {
		return invalid("merge", "it is missing")
	}
	if len(op.Inputs) != inputs {
		return invalid("merge.inputs", "%d are named, but the op has %d", len(op.Inputs), inputs)
	}
	for i, in := range op.Inputs {
		if in == nil {
			return invalid(fmt.Sprintf("merge.inputs[%d]", i), "it is missing")
		}
		if err := checkPosition("input", in.Input, i); err != nil {
			return within(fmt.Sprintf("merge.inputs[%d]", i), err)
		}
	}
	return nil
}

func checkDiff(op *pb.DiffOp, inputs int) error {
	if op == nil {
		return invalid("diff", "it is missing")
	}
	if op.Lower == nil {
		return invalid("diff.lower", "it is missing; -1 says that it is empty")
	}
	if op.Upper == nil {
		return invalid("diff.upper", "it is missing; -1 says that it is empty")
	}
	used := 0
	for _, side := range []struct {
		field string
		input int64
	}{{"diff.lower.input", op.Lower.Input}, {"diff.upper.input", op.Upper.Input}} {
		if side.input == int64(pb.Empty) {
			continue
		}
		if err := checkPosition(side.field, side.input, used); err != nil {
			return err
		}
		used++
	}
	if used != inputs {
		return invalid("inputs", "the diff is of %d inputs, but %d are given", used, inputs)
	}
	return nil
}

func checkPassthrough(op *pb.PassthroughOp, inputs int) (outputs int, err error) {
	if op == nil {
		return 0, invalid("passthrough", "it is missing")
	}
	if op.Id == "" {
		return 0, invalid("passthrough.id", "it is missing")
	}
	if len(op.Outputs) == 0 {
		return 0, invalid("passthrough.outputs", "a passthrough op needs at least one output")
	}
	for i, in := range op.Outputs {
		if in < 0 || in >= int64(inputs) {
			return 0, invalid(fmt.Sprintf("passthrough.outputs[%d]", i), "%d is none of its %d inputs", in, inputs)
		}
	}
	return len(op.Outputs), nil
}

// checkPosition holds a list that numbers its own elements to their order. The
// protocol's clients count up, and upstream goes by position whatever is
// written, so 0, which may be an unset field, passes anywhere; any other number
// would mean one thing here and another there.
func checkPosition(field string, got int64, want int) error {
	if got != int64(want) && got != 0 {
		return invalid(field, "it is %d but stands in place of %d", got, want)
	}
	return nil
}

var errNoMounts = errors.New("a step needs at least the mount of its root filesystem, at /")
