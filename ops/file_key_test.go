package ops

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/ops/filetree/treetest"
	"github.com/moby/buildkit/solver/pb"
	"google.golang.org/protobuf/encoding/protojson"
)

// fileKeyTree is the input whose content digests are in testdata/file_keys.json.
const fileKeyTree treetest.Tree = `
etc d
etc/passwd - 644
etc/group - 644
src d
src/a.go - 644 0:0 a
src/b.txt - 644 0:0 b
src/sub d
src/sub/c.go - 644 0:0 c
top - 644 0:0 t
ln l 777 0:0 src
`

// The keys in testdata/file_keys.json were printed by a program that gave the
// same protobufs to the file op of github.com/moby/buildkit v0.33.1, called its
// CacheMap and, for every input with one, the content function on fileKeyTree.
//
// compat: LLB-152, LLB-153
func TestFileKeysAreUpstreams(t *testing.T) {
	data, err := os.ReadFile("testdata/file_keys.json")
	if err != nil {
		t.Fatal(err)
	}
	var cases []struct {
		Name   string
		Inputs int
		Op     json.RawMessage
		Digest string
		Deps   []struct{ Selector, Content, Err string }
	}
	if err := json.Unmarshal(data, &cases); err != nil {
		t.Fatal(err)
	}
	if len(cases) < 25 {
		t.Fatalf("only %d cases", len(cases))
	}
	m := newTestCache(t)
	ref := fileTestRef(t, m, fileKeyTree, map[string]string{
		"etc/passwd": "app:x:5:6::/:/bin/sh\n", "etc/group": "grp:x:9:\n",
	})
	defer ref.Release()
	for _, c := range cases {
		t.Run(c.Name, func(t *testing.T) {
			var op pb.FileOp
			if err := protojson.Unmarshal(c.Op, &op); err != nil {
				t.Fatal(err)
			}
			if _, err := checkAndPlan(&op, c.Inputs); err != nil {
				t.Fatal(err)
			}
			got, err := fileCacheMap(&op, c.Inputs)
			if err != nil {
				t.Fatal(err)
			}
			if string(got.Digest) != c.Digest {
				t.Errorf("digest %s, want %s", got.Digest, c.Digest)
			}
			if len(got.Deps) != len(c.Deps) {
				t.Fatalf("%d deps, want %d", len(got.Deps), len(c.Deps))
			}
			for i, want := range c.Deps {
				dep := got.Deps[i]
				if string(dep.Selector) != want.Selector {
					t.Errorf("selector %d is %s, want %s", i, dep.Selector, want.Selector)
				}
				if dep.Content == nil {
					if want.Content != "" || want.Err != "" {
						t.Errorf("input %d isn't matched by content", i)
					}
					continue
				}
				content, err := dep.Content(t.Context(), nil, Result{ref})
				if want.Err != "" {
					// From "failed to calculate checksum" on, but for the name of the record.
					_, reason, _ := strings.Cut(want.Err, ": ")
					if err == nil || !errors.Is(err, fs.ErrNotExist) || !strings.HasSuffix(err.Error(), reason) ||
						!strings.HasPrefix(err.Error(), "failed to calculate checksum of ref ") {
						t.Errorf("content of input %d: error %v, want %q", i, err, want.Err)
					}
					continue
				}
				if err != nil || string(content) != want.Content {
					t.Errorf("content of input %d is %s, %v, want %s", i, content, err, want.Content)
				}
			}
		})
	}
}

// What is read of nothing, or of another action, needs no content of an input.
func TestFileKeyOfScratch(t *testing.T) {
	op := &pb.FileOp{Actions: []*pb.FileAction{{Input: -1, SecondaryInput: 0, Action: &pb.FileAction_Copy{Copy: &pb.FileActionCopy{Src: "/x", Dest: "/"}}}}}
	m, err := fileCacheMap(op, 1)
	if err != nil {
		t.Fatal(err)
	}
	_, err = m.Deps[0].Content(t.Context(), nil, Result{})
	if err == nil || err.Error() != "failed to calculate checksum of ref scratch: /x: no such file or directory" {
		t.Errorf("error %v", err)
	}
}

// An owner looked up in what another action made doesn't upset the key.
func TestFileKeyOwnerFromAction(t *testing.T) {
	owner := &pb.ChownOpt{User: &pb.UserOpt{User: &pb.UserOpt_ByName{ByName: &pb.NamedUserOpt{Name: "app", Input: 1}}}}
	op := &pb.FileOp{Actions: []*pb.FileAction{
		{Input: 0, SecondaryInput: -1, Output: -1, Action: &pb.FileAction_Mkdir{Mkdir: &pb.FileActionMkDir{Path: "/a"}}},
		{Input: 1, SecondaryInput: -1, Output: 0, Action: &pb.FileAction_Mkdir{Mkdir: &pb.FileActionMkDir{Path: "/b", Owner: owner}}},
	}}
	m, err := fileCacheMap(op, 1)
	if err != nil || len(m.Deps) != 1 || m.Deps[0].Content != nil {
		t.Errorf("got %+v, %v", m, err)
	}
}
