package ops

import (
	"fmt"

	"github.com/moby/buildkit/solver/pb"
)

// filePlan is what follows from an op's actions alone.
type filePlan struct {
	// outputs holds the action that makes each output.
	outputs []int
	// commit says which actions' states become records of their own: outputs,
	// and what is changed by one action while something else sees it as it was.
	// All others are passed from action to action, in one record.
	commit []bool
}

// newFilePlan checks the action graph: every index names an input or an action,
// outputs are 0 to n-1, each made once, and no action needs itself.
func newFilePlan(op *pb.FileOp, inputs int) (filePlan, error) {
	made := map[int]int{}
	for i, a := range op.Actions {
		if err := checkFileAction(a, inputs+len(op.Actions)); err != nil {
			return filePlan{}, invalid(fmt.Sprintf("file.actions[%d]", i), "%s: %w", fileActionName(a), err)
		}
		if a.Output == int64(pb.SkipOutput) {
			continue
		}
		out := int(a.Output)
		if first, ok := made[out]; ok {
			return filePlan{}, invalid(fmt.Sprintf("file.actions[%d].output", i), "output %d is already made by action %d", out, first)
		}
		made[out] = i
	}
	if len(made) == 0 {
		return filePlan{}, invalid("file.actions", "no action makes an output")
	}
	plan := filePlan{outputs: make([]int, len(made)), commit: make([]bool, len(op.Actions))}
	for i := range plan.outputs {
		action, ok := made[i]
		if !ok {
			return filePlan{}, invalid("file.actions", "%d outputs are made, but none of them is output %d", len(made), i)
		}
		plan.outputs[i], plan.commit[action] = action, true
	}
	if err := checkFileLoops(op, inputs); err != nil {
		return filePlan{}, err
	}
	plan.share(op, inputs)
	return plan, nil
}

func checkFileAction(a *pb.FileAction, states int) error {
	for _, in := range []struct {
		name  string
		index int64
	}{{"input", a.Input}, {"secondary input", a.SecondaryInput}} {
		if in.index < int64(pb.Empty) || in.index >= int64(states) {
			return fmt.Errorf("%s %d is none of the %d inputs and actions", in.name, in.index, states)
		}
	}
	if a.Output < int64(pb.SkipOutput) {
		return fmt.Errorf("output %d is negative", a.Output)
	}
	if c := a.GetCopy(); c != nil {
		if _, err := fileChmod(c); err != nil {
			return err
		}
	}
	owner := fileActionOwner(a)
	for _, o := range []struct {
		name string
		opt  *pb.UserOpt
	}{{"user", owner.GetUser()}, {"group", owner.GetGroup()}} {
		by, ok := o.opt.GetUser().(*pb.UserOpt_ByName)
		if !ok {
			continue
		}
		if by.ByName == nil {
			return fmt.Errorf("%s by name: the name is missing", o.name)
		}
		if by.ByName.Input < 0 || by.ByName.Input >= int64(states) {
			return fmt.Errorf("%s %q is looked up in %d, which is none of the %d inputs and actions", o.name, by.ByName.Name, by.ByName.Input, states)
		}
	}
	return nil
}

// fileNeeds lists the states that an action needs.
func fileNeeds(a *pb.FileAction) []int {
	needs := []int{int(a.Input), int(a.SecondaryInput)}
	owner := fileActionOwner(a)
	for _, o := range []*pb.UserOpt{owner.GetUser(), owner.GetGroup()} {
		if by, ok := o.GetUser().(*pb.UserOpt_ByName); ok {
			needs = append(needs, int(by.ByName.Input))
		}
	}
	return needs
}

func checkFileLoops(op *pb.FileOp, inputs int) error {
	const (
		unseen = iota
		open
		done
	)
	seen := make([]int, len(op.Actions))
	var visit func(state int) error
	visit = func(state int) error {
		i := state - inputs
		if i < 0 || seen[i] == done {
			return nil
		}
		if seen[i] == open {
			return invalid(fmt.Sprintf("file.actions[%d]", i), "%s: it needs its own result, in a loop", fileActionName(op.Actions[i]))
		}
		seen[i] = open
		for _, need := range fileNeeds(op.Actions[i]) {
			if err := visit(need); err != nil {
				return err
			}
		}
		seen[i] = done
		return nil
	}
	for i := range op.Actions {
		if err := visit(inputs + i); err != nil {
			return err
		}
	}
	return nil
}

// share finds the states that must not be changed in place: those that two
// actions go on from, or that one goes on from while another reads them. That
// an action looks up an owner in its own input is no reason: it does so first.
func (p *filePlan) share(op *pb.FileOp, inputs int) {
	base, read := make([]int, len(op.Actions)), make([]int, len(op.Actions))
	for _, a := range op.Actions {
		for i, need := range fileNeeds(a) {
			n := need - inputs
			switch {
			case n < 0:
			case i == 0:
				base[n]++
			case i == 1 || need != int(a.Input):
				read[n]++
			}
		}
	}
	for i := range p.commit {
		p.commit[i] = p.commit[i] || base[i] > 1 || base[i] == 1 && read[i] > 0
	}
}
