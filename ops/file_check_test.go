package ops

import (
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/moby/buildkit/solver/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

// fileTestMkdir is an action that makes p.
func fileTestMkdir(in, out int64, p string) *pb.FileAction {
	return &pb.FileAction{Input: in, SecondaryInput: -1, Output: out,
		Action: &pb.FileAction_Mkdir{Mkdir: &pb.FileActionMkDir{Path: p, Mode: 0o755, Timestamp: -1}}}
}

// fileTestCopy is an action that copies src to dest.
func fileTestCopy(in, from, out int64, src, dest string) *pb.FileAction {
	return &pb.FileAction{Input: in, SecondaryInput: from, Output: out,
		Action: &pb.FileAction_Copy{Copy: &pb.FileActionCopy{Src: src, Dest: dest, Mode: -1, Timestamp: -1, CreateDestPath: true}}}
}

// checkAndPlan is all that is checked of a file op.
func checkAndPlan(op *pb.FileOp, inputs int) (filePlan, error) {
	if _, err := checkFile(op); err != nil {
		return filePlan{}, err
	}
	return newFilePlan(op, inputs)
}

// compat: LLB-060
func TestFileCheckRefuses(t *testing.T) {
	owned := func(in int64) *pb.FileAction {
		a := fileTestMkdir(-1, 0, "/owned")
		a.GetMkdir().Owner = &pb.ChownOpt{Group: &pb.UserOpt{User: &pb.UserOpt_ByName{ByName: &pb.NamedUserOpt{Name: "g", Input: in}}}}
		return a
	}
	nameless := owned(0)
	nameless.GetMkdir().Owner.Group.User = &pb.UserOpt_ByName{}
	badMode := fileTestCopy(0, 0, 0, "/a", "/b")
	badMode.GetCopy().ModeStr = "u+q"
	for _, c := range []struct {
		name    string
		actions []*pb.FileAction
		field   string
		err     string
	}{
		{"no actions", nil, "file.actions", "at least one"},
		{"nil action", []*pb.FileAction{nil}, "file.actions[0]", "missing"},
		{"no body", []*pb.FileAction{{Input: -1, SecondaryInput: -1}}, "file.actions[0]", "missing"},
		{"nil body", []*pb.FileAction{{Input: -1, SecondaryInput: -1, Action: &pb.FileAction_Copy{}}}, "file.actions[0]", "no body"},
		{"input too large", []*pb.FileAction{fileTestMkdir(3, 0, "/a"), fileTestMkdir(0, 1, "/b")}, "file.actions[0]", "mkdir /a: input 3 is none of the 3"},
		{"input too small", []*pb.FileAction{fileTestMkdir(-2, 0, "/a")}, "file.actions[0]", "input -2"},
		{"secondary input", []*pb.FileAction{fileTestCopy(0, 7, 0, "/a", "/b")}, "file.actions[0]", "copy /a /b: secondary input 7"},
		{"owner's input", []*pb.FileAction{owned(9)}, "file.actions[0]", "group \"g\" is looked up in 9"},
		{"owner's input below 0", []*pb.FileAction{owned(-1)}, "file.actions[0]", "looked up in -1"},
		{"owner without name", []*pb.FileAction{nameless}, "file.actions[0]", "the name is missing"},
		{"mode", []*pb.FileAction{badMode}, "file.actions[0]", "mode \"u+q\""},
		{"negative output", []*pb.FileAction{fileTestMkdir(0, -2, "/a")}, "file.actions[0]", "output -2"},
		{"no output", []*pb.FileAction{fileTestMkdir(0, -1, "/a")}, "file.actions", "no action makes an output"},
		{"gap in outputs", []*pb.FileAction{fileTestMkdir(0, 0, "/a"), fileTestMkdir(0, 2, "/b")}, "file.actions", "none of them is output 1"},
		{"output twice", []*pb.FileAction{fileTestMkdir(0, 0, "/a"), fileTestMkdir(0, 0, "/b")}, "file.actions[1].output", "already made by action 0"},
		{"own result", []*pb.FileAction{fileTestMkdir(1, 0, "/a")}, "file.actions[0]", "loop"},
		{"loop", []*pb.FileAction{fileTestCopy(0, 2, 0, "/a", "/b"), fileTestMkdir(1, 1, "/c")}, "file.actions[0]", "loop"},
		{"loop by owner", []*pb.FileAction{owned(1)}, "file.actions[0]", "loop"},
		{"loop that no output needs", []*pb.FileAction{fileTestMkdir(0, 0, "/a"), fileTestMkdir(3, -1, "/b"), fileTestMkdir(2, -1, "/c")}, "file.actions[1]", "loop"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := checkAndPlan(&pb.FileOp{Actions: c.actions}, 1)
			var de *DefinitionError
			if !errors.As(err, &de) {
				t.Fatalf("error %v", err)
			}
			if de.Field != c.field || de.Code != codes.InvalidArgument || !strings.Contains(err.Error(), c.err) {
				t.Errorf("error %v (%s, %s)", err, de.Field, de.Code)
			}
		})
	}
}

// compat: LLB-060
func TestFilePlan(t *testing.T) {
	owner := fileTestMkdir(1, 0, "/b")
	owner.GetMkdir().Owner = &pb.ChownOpt{User: &pb.UserOpt{User: &pb.UserOpt_ByName{ByName: &pb.NamedUserOpt{Name: "u", Input: 1}}}}
	for _, c := range []struct {
		name    string
		actions []*pb.FileAction
		want    filePlan
	}{
		{"chain", []*pb.FileAction{fileTestMkdir(0, -1, "/a"), fileTestMkdir(1, -1, "/b"), fileTestMkdir(2, 0, "/c")},
			filePlan{[]int{2}, []bool{false, false, true}}},
		{"fork", []*pb.FileAction{fileTestMkdir(0, -1, "/a"), fileTestMkdir(1, 1, "/b"), fileTestMkdir(1, 0, "/c")},
			filePlan{[]int{2, 1}, []bool{true, true, true}}},
		{"read only", []*pb.FileAction{fileTestMkdir(-1, -1, "/a"), fileTestCopy(0, 1, 0, "/a", "/b")},
			filePlan{[]int{1}, []bool{false, true}}},
		{"read and changed", []*pb.FileAction{fileTestMkdir(-1, -1, "/a"), fileTestMkdir(1, -1, "/b"), fileTestCopy(2, 1, 0, "/a", "/c")},
			filePlan{[]int{2}, []bool{true, false, true}}},
		{"copy within", []*pb.FileAction{fileTestMkdir(0, -1, "/a"), fileTestCopy(1, 1, 0, "/a", "/b")},
			filePlan{[]int{1}, []bool{true, true}}},
		{"owner from its own input", []*pb.FileAction{fileTestMkdir(0, -1, "/a"), owner},
			filePlan{[]int{1}, []bool{false, true}}},
	} {
		got, err := checkAndPlan(&pb.FileOp{Actions: c.actions}, 1)
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: got %v, %v, want %v", c.name, got, err, c.want)
		}
	}
}

// FuzzFileCheck feeds op bodies from outside: what is accepted must have a key
// and a plan, whatever it says.
func FuzzFileCheck(f *testing.F) {
	for _, actions := range [][]*pb.FileAction{
		{fileTestMkdir(-1, 0, "/a")},
		{fileTestMkdir(0, -1, "/a"), fileTestCopy(1, 0, 0, "/a/*", "/b/")},
	} {
		data, err := proto.Marshal(&pb.FileOp{Actions: actions})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, 1)
	}
	f.Fuzz(func(t *testing.T, data []byte, inputs int) {
		var op pb.FileOp
		if proto.Unmarshal(data, &op) != nil || inputs < 0 || inputs > 100 {
			return
		}
		plan, err := checkAndPlan(&op, inputs)
		if err != nil {
			return
		}
		if len(plan.outputs) == 0 || len(plan.commit) != len(op.Actions) {
			t.Errorf("plan %v", plan)
		}
		if m, err := fileCacheMap(&op, inputs); err != nil || len(m.Deps) != inputs {
			t.Errorf("key %v, %v", m, err)
		}
	})
}
