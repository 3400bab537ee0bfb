package ops

import (
	"strings"
	"unicode/utf8"

	"github.com/moby/buildkit/solver/pb"
)

// customName is the key of a description that names the vertex.
const customName = "llb.customname"

// maxName bounds names that are made of other names. Without it a chain of
// merges, each of two times the one before, doubles its name at every step.
const maxName = 1024

// name is what clients show for n (CTL-070). The inputs have their names.
func (n *node) name() string {
	if n.meta != nil {
		if name, ok := n.meta.Description[customName]; ok {
			return name
		}
	}
	switch op := n.op.Op.(type) {
	case *pb.Op_Source:
		return op.Source.Identifier
	case *pb.Op_Exec:
		return strings.Join(op.Exec.Meta.Args, " ")
	case *pb.Op_File:
		return fileName(op.File.Actions)
	case *pb.Op_Build:
		return "build"
	case *pb.Op_Merge:
		return n.mergeName()
	case *pb.Op_Diff:
		return clip("diff " + n.diffSide(op.Diff.Lower.Input, 0) + " -> " + n.diffSide(op.Diff.Upper.Input, len(n.inputs)-1))
	case *pb.Op_Passthrough:
		return "passthrough " + op.Passthrough.Id
	}
	return "unknown"
}

func (n *node) mergeName() string {
	name := "merge ("
	for i, in := range n.inputs {
		if i > 0 {
			name += ", "
		}
		name += clip(in.vertex.Name)
		if len(name) > maxName {
			break // clip cuts it off here
		}
	}
	return clip(name + ")")
}

func (n *node) diffSide(input int64, index int) string {
	if input == int64(pb.Empty) {
		return "scratch"
	}
	return "(" + clip(n.inputs[index].vertex.Name) + ")"
}

func fileName(actions []*pb.FileAction) string {
	names := make([]string, len(actions))
	for i, a := range actions {
		names[i] = fileActionName(a)
	}
	return strings.Join(names, ", ")
}

// clip shortens name to maxName bytes without cutting through a character.
func clip(name string) string {
	if len(name) <= maxName {
		return name
	}
	const ellipsis = "…"
	end := maxName - len(ellipsis)
	for end > 0 && !utf8.RuneStart(name[end]) {
		end--
	}
	return name[:end] + ellipsis
}
