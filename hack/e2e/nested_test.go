//go:build e2e

package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/client/llb"
	"github.com/moby/buildkit/solver/pb"
	spb "github.com/moby/buildkit/sourcepolicy/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/proto"
)

// nestedIn solves the definition that is in the file name of where; "" is the
// default one.
func nestedIn(t *testing.T, where llb.State, name string) *pb.Definition {
	t.Helper()
	def, err := where.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	last := len(def.Def) - 1
	pointer := &pb.Op{}
	if err := proto.Unmarshal(def.Def[last], pointer); err != nil {
		t.Fatal(err)
	}
	build := &pb.BuildOp{Builder: int64(pb.LLBBuilder), Inputs: map[string]*pb.BuildInput{pb.LLBDefinitionInput: {Input: 0}}}
	if name != "" {
		build.Attrs = map[string]string{pb.AttrLLBDefinitionFilename: name}
	}
	add := func(op *pb.Op) digest.Digest {
		raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(op)
		if err != nil {
			t.Fatal(err)
		}
		def.Def = append(def.Def, raw)
		return digest.FromBytes(raw)
	}
	def.Def = def.Def[:last]
	dgst := add(&pb.Op{Inputs: pointer.Inputs, Op: &pb.Op_Build{Build: build}})
	def.Metadata[string(dgst)] = &pb.OpMetadata{
		Caps:        map[string]bool{string(pb.CapBuildOpLLBFileName): true},
		Description: map[string]string{"llb.customname": "the nested build"},
	}
	add(&pb.Op{Inputs: []*pb.Input{{Digest: string(dgst)}}})
	return def
}

// carrier has def in the file name.
func carrier(t *testing.T, def *pb.Definition, name string) llb.State {
	t.Helper()
	text, err := proto.Marshal(def)
	if err != nil {
		t.Fatal(err)
	}
	return llb.Scratch().File(llb.Mkdir(filepath.Dir("/"+name), 0o755, llb.WithParents(true)).Mkfile("/"+name, 0o644, text))
}

func marshalled(t *testing.T, st llb.State) *pb.Definition {
	t.Helper()
	def, err := st.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return def
}

func solveNested(t *testing.T, addr string, def *pb.Definition, args ...string) result {
	t.Helper()
	var in bytes.Buffer
	if err := llb.WriteTo(def, &in); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(env.peer, "buildctl"), append([]string{"--addr", addr, "build", "--progress=plain"}, args...)...)
	cmd.Stdin = &in
	return runCommand(t, cmd)
}

// A definition in a file of an input is solved, here and in upstream's daemon,
// under the same keys: what either caches is a hit of the other. compat: LLB-082, LLB-C37
func TestNestedBuild(t *testing.T) {
	nestedCached := regexp.MustCompile(`#(\d) the nested build\n#\d CACHED`)
	d := newDaemon(t)
	peer := peerDaemon(t)
	base := llb.Image(env.base)
	inner := marshalled(t, llb.Scratch().File(llb.Copy(base.Run(llb.Args([]string{"sh", "-c", "echo made inside > /f"})).Root(), "/f", "/f")))
	middle := nestedIn(t, carrier(t, inner, "d/def"), "d/def")
	for _, c := range []struct {
		name string
		def  *pb.Definition
	}{
		{"default name", nestedIn(t, carrier(t, inner, pb.LLBDefaultDefinitionFile), "")},
		{"another name", middle},
		{"twice", nestedIn(t, carrier(t, middle, "outer"), "outer")},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, addr := range []string{d.addr, peer} {
				out := t.TempDir()
				solveNested(t, addr, c.def, "--output", "type=local,dest="+out).must(t)
				if got := readFile(t, out, "f"); got != "made inside\n" {
					t.Errorf("%s: %q", addr, got)
				}
			}
		})
	}
	again := solveNested(t, d.addr, middle).must(t)
	if !nestedCached.MatchString(again.stderr) || strings.Contains(again.stderr, "echo made") {
		t.Errorf("built again:\n%s", again.stderr)
	}

	dir := t.TempDir()
	solveNested(t, peer, middle, "--export-cache", "type=local,mode=max,dest="+dir).must(t)
	fresh := newDaemon(t)
	r := solveNested(t, fresh.addr, middle, "--import-cache", "type=local,src="+dir, "--output", "type=local,dest="+t.TempDir()).must(t)
	if strings.Contains(r.stderr, "echo made") || !strings.Contains(r.stderr, "CACHED") {
		t.Errorf("with upstream's cache:\n%s", r.stderr)
	}
}

// What is wrong with a nested build is said with its file, and of a step in it
// where that step comes from. A build that would wait for itself ends.
//
// compat: LLB-082, LLB-012
func TestNestedBuildFails(t *testing.T) {
	d := newDaemon(t)
	failing := marshalled(t, llb.Image(env.base).Run(llb.Args([]string{"sh", "-c", "echo so it was; exit 7"})).Root())
	for i, raw := range failing.Def { // as a frontend says where its ops come from
		op := &pb.Op{}
		if err := proto.Unmarshal(raw, op); err != nil || op.GetExec() == nil {
			continue
		}
		failing.Source = &pb.Source{
			Infos: []*pb.SourceInfo{{Filename: "inner.txt", Data: []byte("one\ntwo is at fault\n")}},
			Locations: map[string]*pb.Locations{string(digest.FromBytes(failing.Def[i])): {Locations: []*pb.Location{{
				Ranges: []*pb.Range{{Start: &pb.Position{Line: 2}, End: &pb.Position{Line: 2}}},
			}}}},
		}
	}
	solveNested(t, d.addr, nestedIn(t, carrier(t, failing, "f"), "f")).fails(t, "exit code: 7", "so it was", "inner.txt:2", ">>> two is at fault")

	something := llb.Scratch().File(llb.Mkfile("/f", 0o644, []byte("no definition")).Mkdir("/dir", 0o755))
	for _, c := range []struct {
		def  *pb.Definition
		want []string
	}{
		{nestedIn(t, something, ""), []string{"read the definition", pb.LLBDefaultDefinitionFile, "no such file"}},
		{nestedIn(t, something, "f"), []string{"read the definition f", "no marshalled LLB"}},
		{nestedIn(t, something, "dir"), []string{"read the definition dir", "not a regular file"}},
		{nestedIn(t, something, "../../../etc/passwd"), []string{"../../../etc/passwd", "no such file"}},
		{nestedIn(t, llb.Scratch().File(llb.Mkfile("/e", 0o644, nil)), "e"), []string{"read the definition e", "it is empty"}},
		{nestedIn(t, carrier(t, &pb.Definition{Def: [][]byte{{8, 1}, {8, 1}}}, "bad"), "bad"), []string{"definition in bad", "op sha256:"}},
	} {
		solveNested(t, d.addr, c.def).fails(t, c.want...)
	}

	denied := withPolicy(t, []*spb.Rule{sourceRule(spb.PolicyAction_DENY, "docker-image://*", spb.MatchType_WILDCARD, nil)})
	solveNested(t, d.addr, nestedIn(t, carrier(t, failing, "f"), "f"), denied...).fails(t, "definition in f", "denied by policy")

	// The file of a local source can hold the definition that reads it.
	ctx := t.TempDir()
	circle := nestedIn(t, llb.Local("ctx"), "def")
	text, err := proto.Marshal(circle)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(ctx, "def"), text, 0o600); err != nil {
		t.Fatal(err)
	}
	solveNested(t, d.addr, circle, "--local", "ctx="+ctx).fails(t, "definition in def", "it is among its own steps")
}
