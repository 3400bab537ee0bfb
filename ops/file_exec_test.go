package ops

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/ops/filetree/treetest"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
)

// fileTestRef commits a record with the tree, and text in some of its files.
func fileTestRef(t testing.TB, m *cache.Manager, tree treetest.Tree, text map[string]string) *cache.Ref {
	t.Helper()
	return commitRef(t, m, nil, func(dir string) {
		tree.MakeIn(t, dir)
		for name, s := range text {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(s), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// fileTestOp makes the op of actions on so many inputs.
func fileTestOp(t testing.TB, m *cache.Manager, inputs int, actions ...*pb.FileAction) *fileOp {
	t.Helper()
	file := &pb.FileOp{Actions: actions}
	op := &pb.Op{Op: &pb.Op_File{File: file}}
	for range inputs {
		op.Inputs = append(op.Inputs, &pb.Input{})
	}
	f, err := newTestLoader(t, Config{Cache: m}).newFileOp(vertex{pb: op, name: "test"}, file)
	if err != nil {
		t.Fatal(err)
	}
	return f.(*fileOp)
}

// fileTestState describes what a result holds.
func fileTestState(t testing.TB, r solver.Result) string {
	t.Helper()
	v, err := r.(Result).Ref.Open(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	return treetest.Dump(t, v.Path(), false)
}

func fileTestMkfile(in, out int64, p, data string) *pb.FileAction {
	return &pb.FileAction{Input: in, SecondaryInput: -1, Output: out,
		Action: &pb.FileAction_Mkfile{Mkfile: &pb.FileActionMkFile{Path: p, Mode: 0o644, Data: []byte(data), Timestamp: -1}}}
}

func fileTestRm(in, out int64, p string) *pb.FileAction {
	return &pb.FileAction{Input: in, SecondaryInput: -1, Output: out, Action: &pb.FileAction_Rm{Rm: &pb.FileActionRm{Path: p}}}
}

// compat: LLB-060
func TestFileExecGraph(t *testing.T) {
	m := newTestCache(t)
	base := fileTestRef(t, m, "base - 644 0:0 b", nil)
	defer base.Release()
	other := fileTestRef(t, m, "o d\no/f - 600 1:2 other", nil)
	defer other.Release()
	named := fileTestMkdir(2, 0, "/mine")
	named.GetMkdir().Owner = &pb.ChownOpt{User: &pb.UserOpt{User: &pb.UserOpt_ByName{ByName: &pb.NamedUserOpt{Name: "me", Input: 2}}}}

	for _, c := range []struct {
		name    string
		actions []*pb.FileAction
		want    []string // per output; base and its file are at 0, other at 1
	}{
		{"chain", []*pb.FileAction{fileTestMkfile(0, -1, "/a", "1"), fileTestMkfile(2, -1, "/b", "2"), fileTestRm(3, 0, "/base")},
			[]string{"a - 644 0:0 1\nb - 644 0:0 2"}},
		{"on nothing", []*pb.FileAction{fileTestMkfile(-1, 0, "/a", "1")}, []string{"a - 644 0:0 1"}},
		{"copy", []*pb.FileAction{fileTestCopy(0, 1, 0, "/o", "/x/")}, []string{"base - 644 0:0 b\nx d 755 0:0\nx/o d 755 0:0\nx/o/f - 600 1:2 other"}},
		{"fork", []*pb.FileAction{fileTestMkfile(0, 2, "/a", "1"), fileTestMkfile(2, 1, "/l", "2"), fileTestMkfile(2, 0, "/r", "3")}, []string{
			"a - 644 0:0 1\nbase - 644 0:0 b\nr - 644 0:0 3",
			"a - 644 0:0 1\nbase - 644 0:0 b\nl - 644 0:0 2",
			"a - 644 0:0 1\nbase - 644 0:0 b",
		}},
		{"copy from an action", []*pb.FileAction{fileTestMkfile(-1, -1, "/a", "1"), fileTestCopy(0, 2, 0, "/a", "/c")}, []string{"base - 644 0:0 b\nc - 644 0:0 1"}},
		{"copy from what is changed later", []*pb.FileAction{fileTestMkfile(-1, -1, "/a", "1"), fileTestMkfile(2, -1, "/a", "2"), fileTestCopy(3, 2, 0, "/a", "/c")},
			[]string{"a - 644 0:0 2\nc - 644 0:0 1"}},
		{"copy within", []*pb.FileAction{fileTestCopy(0, 0, 0, "/", "/in/")}, []string{"base - 644 0:0 b\nin d 755 0:0\nin/base - 644 0:0 b"}},
		{"copy from nothing to nothing", []*pb.FileAction{fileTestCopy(-1, -1, 0, "/", "/in/")}, []string{"in d 755 0:0"}},
		{"actions out of order", []*pb.FileAction{fileTestMkfile(3, 0, "/b", "2"), fileTestMkfile(0, -1, "/a", "1")}, []string{"a - 644 0:0 1\nb - 644 0:0 2\nbase - 644 0:0 b"}},
		{"what no output needs isn't run", []*pb.FileAction{fileTestMkfile(-1, 0, "/a", "1"), fileTestRm(-1, -1, "/missing")}, []string{"a - 644 0:0 1"}},
		{"owner from what was just made", []*pb.FileAction{
			fileTestCopy(-1, 0, -1, "/base", "/etc/"), named}, []string{"etc d 755 0:0\netc/base - 644 0:0 b\nmine d 755 0:0"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			op := fileTestOp(t, m, 2, c.actions...)
			out, err := op.Exec(t.Context(), nil, results(base, other))
			if err != nil {
				t.Fatal(err)
			}
			if len(out) != len(c.want) {
				t.Fatalf("%d outputs, want %d", len(out), len(c.want))
			}
			for i, r := range out {
				if got := fileTestState(t, r); got != c.want[i] {
					t.Errorf("output %d is\n%s\nwant\n%s", i, got, c.want[i])
				}
				r.Release()
			}
		})
	}
	if got := fileTestState(t, Result{base}); got != "base - 644 0:0 b" {
		t.Errorf("the input became %s", got)
	}
}

// A failure says which action it was and leaves no record behind.
//
// compat: LLB-078
func TestFileExecFailure(t *testing.T) {
	m := newTestCache(t)
	base := fileTestRef(t, m, "base - 644 0:0 b", nil)
	defer base.Release()
	count := func() int {
		usage, err := m.DiskUsage(t.Context(), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		return len(usage)
	}
	before := count()
	for _, c := range []struct {
		name    string
		actions []*pb.FileAction
		index   int
		want    string
	}{
		{"copy", []*pb.FileAction{fileTestMkfile(0, 1, "/a", "1"), fileTestMkfile(1, -1, "/b", ""), fileTestCopy(2, 0, 0, "/missing", "/x")}, 2, `"/missing": not found`},
		{"rm", []*pb.FileAction{fileTestRm(0, -1, "/x"), fileTestMkfile(1, 0, "/b", "")}, 0, "lstat /x: no such file or directory"},
		{"mkfile", []*pb.FileAction{fileTestMkfile(0, 0, "/no/b", "")}, 0, "mkfile /no/b: no such file or directory"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := fileTestOp(t, m, 1, c.actions...).Exec(t.Context(), nil, results(base))
			var fe *FileActionError
			if !errors.As(err, &fe) || fe.Index != c.index || err.Error() != c.want {
				t.Errorf("error %v, want %q of action %d", err, c.want, c.index)
			}
		})
	}
	if got := count(); got != before {
		t.Errorf("%d records, %d before", got, before)
	}
}

func TestFileExecCancelled(t *testing.T) {
	m := newTestCache(t)
	stop := errors.New("stopped")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(stop)
	_, err := fileTestOp(t, m, 0, fileTestMkfile(-1, 0, "/a", "")).Exec(ctx, nil, nil)
	if !errors.Is(err, stop) {
		t.Errorf("error %v", err)
	}
}

// An input that is gone when it is used is the solver's to make again.
func TestFileExecLostInput(t *testing.T) {
	r := &fileRun{inputs: make([]*cache.Ref, 2)}
	lost := errors.Join(errors.New("open"), cache.ErrLost)
	var le *solver.LostError
	if err := r.lost(1, lost); !errors.As(err, &le) || len(le.Inputs) != 1 || le.Inputs[0] != 1 {
		t.Errorf("input 1: %v", err)
	}
	for _, state := range []int{-1, 2} {
		if err := r.lost(state, lost); errors.As(err, &le) || err != lost {
			t.Errorf("state %d: %v", state, err)
		}
	}
	wrapped := error(&FileActionError{Index: 3, Err: r.lost(0, lost)})
	if !errors.As(wrapped, &le) || !strings.Contains(wrapped.Error(), "lost") {
		t.Errorf("wrapped: %v", wrapped)
	}
}
