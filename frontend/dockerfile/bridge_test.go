package dockerfile

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/distribution/reference"
	"github.com/kilnbuild/kiln/client/llb"
	"github.com/kilnbuild/kiln/frontend"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/ops/source/git"
	"github.com/kilnbuild/kiln/ops/source/http"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	fstypes "github.com/tonistiigi/fsutil/types"
)

// testCase is a file of testdata/cases: sections that begin with "-- name --".
// The sections attrs, http and input:* are attributes, what any URL serves and
// frontend inputs; those that begin with @dir/ are files of that named
// directory, and all others files of the main one.
type testCase struct {
	name  string
	about string
	files map[string]string
	opts  map[string]string
}

func loadCases(t testing.TB) []testCase {
	t.Helper()
	paths, err := filepath.Glob("testdata/cases/*.txt")
	if err != nil || len(paths) == 0 {
		t.Fatalf("no cases: %v", err)
	}
	var cases []testCase
	for _, p := range paths {
		dt, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		cases = append(cases, parseCase(strings.TrimSuffix(filepath.Base(p), ".txt"), string(dt)))
	}
	return cases
}

func parseCase(name, text string) testCase {
	c := testCase{name: name, files: map[string]string{}, opts: map[string]string{}}
	section := ""
	for line := range strings.Lines(text) {
		if s, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "-- "); ok && strings.HasSuffix(s, " --") {
			section = strings.TrimSuffix(s, " --")
			c.files[section] = ""
			continue
		}
		if section == "" {
			c.about += line
		} else {
			c.files[section] += line
		}
	}
	for line := range strings.SplitSeq(strings.TrimSpace(c.files["attrs"]), "\n") {
		if k, v, ok := strings.Cut(line, "="); ok {
			c.opts[k] = v
		}
	}
	return c
}

// request is the case as a frontend gets it.
func (c testCase) request(t testing.TB) frontend.Request {
	t.Helper()
	req := frontend.Request{Opts: maps.Clone(c.opts), SessionID: "session", Inputs: map[string]*pb.Definition{}}
	for name, data := range c.files {
		if input, ok := strings.CutPrefix(name, "input:"); ok {
			def, err := llb.Scratch().File(llb.Mkfile("/Dockerfile", 0o644, []byte(data))).Marshal(llb.LinuxAmd64)
			if err != nil {
				t.Fatal(err)
			}
			req.Inputs[input] = def
		}
	}
	return req
}

// fakeBridge is a daemon with files in memory. It notes what it is asked.
type fakeBridge struct {
	files  map[string]string
	images map[string]map[string]any

	mu       sync.Mutex
	warnings []string
	solves   []string
	resolves []string
}

func newBridge(t testing.TB, files map[string]string) *fakeBridge {
	t.Helper()
	dt, err := os.ReadFile("testdata/images.json")
	if err != nil {
		t.Fatal(err)
	}
	b := &fakeBridge{files: files}
	if err := json.Unmarshal(dt, &b.images); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *fakeBridge) note(list *[]string, format string, a ...any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	*list = append(*list, fmt.Sprintf(format, a...))
}

func (b *fakeBridge) NewContainer(context.Context, frontend.ContainerRequest) (frontend.Container, error) {
	return nil, errors.New("the Dockerfile frontend needs no containers")
}

func (b *fakeBridge) Platforms() []ocispec.Platform {
	return []ocispec.Platform{{OS: "linux", Architecture: "amd64"}}
}

func (b *fakeBridge) Warn(_ context.Context, w progress.Warning) {
	info, _ := w.SourceInfo.(*pb.SourceInfo)
	ranges, _ := w.Ranges.([]*pb.Range)
	var detail []string
	for _, d := range w.Detail {
		detail = append(detail, string(d))
	}
	b.note(&b.warnings, "%s | level %d | %s | %s | %s | %s",
		showRanges(ranges), w.Level, w.Short, strings.Join(detail, ";"), w.URL, info.GetFilename())
}

func (b *fakeBridge) ResolveSourceMeta(_ context.Context, op *pb.SourceOp, opt frontend.MetaOptions) (*frontend.SourceMeta, error) {
	p := "-"
	if opt.Platform != nil {
		p = strings.TrimSuffix(path.Join(opt.Platform.OS, opt.Platform.Architecture, opt.Platform.Variant), "/")
	}
	b.note(&b.resolves, "%s | %s | %s | %s", opt.LogName, op.Identifier, p, opt.ResolveMode)
	meta := &frontend.SourceMeta{Op: op}
	scheme, ref, _ := strings.Cut(op.Identifier, "://")
	switch scheme {
	case "git":
		if opt.Objects {
			meta.Git = &git.Meta{CommitObject: []byte("tree 4b825dc642cb6eb9a060e54bf8d69288fbee4904\nauthor A <a@b> 1400000000 +0000\n" +
				"committer C D <c@d> 1400000001 +0000\n\nmessage\n")}
		}
	case "http", "https":
		t := time.Unix(1500000000, 0).UTC()
		meta.HTTP = &http.Meta{LastModified: &t}
	default:
		var err error
		meta.Config, err = b.imageConfig(ref, opt.Platform)
		meta.Digest = digest.FromString(ref)
		return meta, err
	}
	return meta, nil
}

// imageConfig is the config of any image but those that are missing. images.json
// overrides it by name.
func (b *fakeBridge) imageConfig(ref string, p *ocispec.Platform) ([]byte, error) {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return nil, err
	}
	name := reference.FamiliarName(named)
	if strings.HasPrefix(name, "missing") || name == "busybx" {
		return nil, fmt.Errorf("%s: not found", ref)
	}
	if p == nil {
		p = &ocispec.Platform{OS: "linux", Architecture: "amd64"}
	}
	img := map[string]any{
		"architecture": p.Architecture, "os": p.OS, "created": "2020-01-02T03:04:05Z",
		"config":  map[string]any{"Env": []string{"PATH=/usr/local/bin:/usr/bin:/bin"}, "Cmd": []string{"sh"}},
		"rootfs":  map[string]any{"type": "layers", "diff_ids": []string{digest.FromString(name).String()}},
		"history": []any{map[string]any{"created_by": "base layer of " + name}},
	}
	if p.Variant != "" {
		img["variant"] = p.Variant
	}
	maps.Copy(img, b.images[name])
	if name == "no-layers" {
		delete(img, "history")
	}
	return json.Marshal(img)
}

func (b *fakeBridge) Solve(_ context.Context, req frontend.SolveRequest) (*frontend.Result, error) {
	if req.Frontend != "" {
		var opts []string
		for k, v := range req.Opts {
			opts = append(opts, k+"="+v)
		}
		slices.Sort(opts)
		b.note(&b.solves, "forward to %s: %s", req.Frontend, strings.Join(opts, " "))
		if strings.HasSuffix(req.Opts["source"], "fails") {
			return nil, errors.New("frontend failed")
		}
		return &frontend.Result{Metadata: map[string][]byte{"forwarded": []byte("yes")}}, nil
	}
	var imports []string
	for _, c := range req.CacheImports {
		imports = append(imports, c.Type+":"+c.Attrs["ref"])
	}
	head, err := llb.Head(req.Definition)
	if err != nil {
		return nil, err
	}
	b.note(&b.solves, "%s %s %s", head, req.Definition.Metadata[head.String()].GetDescription()["llb.customname"], strings.Join(imports, ","))
	ref, err := b.open(req.Definition)
	return &frontend.Result{Ref: ref}, err
}

// open finds out what files a definition stands for.
func (b *fakeBridge) open(def *pb.Definition) (*fakeRef, error) {
	r := &fakeRef{def: def, files: map[string]string{}}
	prefix := ""
	for i := len(def.Def) - 2; i >= 0; i-- {
		var op pb.Op
		if err := op.UnmarshalVT(def.Def[i]); err != nil {
			return nil, err
		}
		if src := op.GetSource(); src != nil {
			name, ok := strings.CutPrefix(src.Identifier, "local://")
			if ok && name != "context" && name != "dockerfile" && name != "mine" {
				prefix = "@" + name + "/"
			}
			if isRemote(src.Identifier) {
				r.files[src.Attrs[pb.AttrHTTPFilename]] = b.files["http"]
				return r, nil
			}
			break
		}
		if f := op.GetFile(); f != nil && f.Actions[0].GetCopy() != nil {
			break // an extracted archive: it holds the main files
		}
		if f := op.GetFile(); len(f.GetActions()) == 1 && f.Actions[0].GetMkfile() != nil {
			mk := f.Actions[0].GetMkfile()
			r.files[strings.TrimPrefix(mk.Path, "/")] = string(mk.Data)
			return r, nil
		}
	}
	for name, data := range b.files {
		if p, ok := strings.CutPrefix(name, prefix); ok && name != "attrs" && name != "http" {
			r.files[p] = data
		}
	}
	return r, nil
}

type fakeRef struct {
	def   *pb.Definition
	files map[string]string
}

func (r *fakeRef) Definition() *pb.Definition     { return r.def }
func (r *fakeRef) Evaluate(context.Context) error { return nil }

func (r *fakeRef) find(name string) (string, error) {
	name = path.Clean(strings.TrimPrefix(name, "/"))
	if data, ok := r.files[name]; ok {
		return data, nil
	}
	return "", &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
}

func (r *fakeRef) ReadFile(_ context.Context, name string, rng *gwpb.FileRange) ([]byte, error) {
	data, err := r.find(name)
	if err != nil {
		return nil, err
	}
	if n := int(rng.GetLength()); n > 0 && n < len(data) {
		data = data[:n]
	}
	return []byte(data), nil
}

func (r *fakeRef) StatFile(_ context.Context, name string) (*fstypes.Stat, error) {
	data, err := r.find(name)
	if err != nil {
		return nil, err
	}
	return &fstypes.Stat{Path: path.Base(name), Size: int64(len(data))}, nil
}

func (r *fakeRef) ReadDir(context.Context, string, string) ([]*fstypes.Stat, error) {
	return nil, errors.New("not asked for in these tests")
}

func showRanges(ranges []*pb.Range) string {
	var out []string
	for _, r := range ranges {
		out = append(out, fmt.Sprintf("%d-%d", r.Start.Line, r.End.Line))
	}
	return strings.Join(out, ",")
}
