package build

import (
	"maps"
	"slices"
	"strings"
	"testing"

	control "github.com/moby/buildkit/api/services/control"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	spb "github.com/moby/buildkit/sourcepolicy/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestRefusedRequests(t *testing.T) {
	for want, req := range map[string]*control.SolveRequest{
		"Ref is missing":       {},
		"Ref has 300 bytes":    {Ref: strings.Repeat("r", 300)},
		"exclude each other":   {Ref: "r", Frontend: "f", Definition: &pb.Definition{Def: [][]byte{{1}}}},
		`FrontendInputs["i"]`:  {Ref: "r", FrontendInputs: map[string]*pb.Definition{"i": nil}},
		"Exporters[1].Type":    {Ref: "r", Exporters: []*control.Exporter{{Type: "image"}, nil}},
		"SourcePolicy: rule 0": {Ref: "r", SourcePolicy: &spb.Policy{Rules: []*spb.Rule{{}}}},
		"ProxyNetwork":         {Ref: "r", ProxyNetwork: true},
		"30, not 20":           {Ref: "r", CompatibilityVersion: 20},
		"upgrade":              {Ref: "r", CompatibilityVersion: 31},
		"not one of":           {Ref: "r", CompatibilityVersion: -1},
	} {
		_, err := ParseRequest(req)
		if c := status.Code(err); c != codes.InvalidArgument && c != codes.Unimplemented || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want %q", req, err, want)
		}
	}
}

// compat: CTL-018
func TestDeprecatedExporter(t *testing.T) {
	req, err := ParseRequest(&control.SolveRequest{Ref: "r", ExporterDeprecated: "image", ExporterAttrsDeprecated: map[string]string{"name": "n"}})
	if err != nil || len(req.Exporters) != 1 || req.Exporters[0].Type != "image" || req.Exporters[0].Attrs["name"] != "n" {
		t.Errorf("%v, %v", req.Exporters, err)
	}
	req, err = ParseRequest(&control.SolveRequest{Ref: "r", ExporterDeprecated: "image", Exporters: []*control.Exporter{{Type: "oci"}}})
	if err != nil || len(req.Exporters) != 1 || req.Exporters[0].Type != "oci" {
		t.Errorf("%v, %v", req.Exporters, err)
	}
}

// compat: CTL-031
func TestEpochReachesExporters(t *testing.T) {
	for _, c := range []struct {
		value string
		want  []map[string]string
	}{
		{"5", []map[string]string{{"source-date-epoch": "5"}, {"source-date-epoch": "9"}}},
		{"", []map[string]string{{"source-date-epoch": ""}, {"source-date-epoch": "9"}}},
		{"context", []map[string]string{nil, {"source-date-epoch": "9"}}},
	} {
		req, err := ParseRequest(&control.SolveRequest{
			Ref: "r", Frontend: "f", FrontendAttrs: map[string]string{"build-arg:SOURCE_DATE_EPOCH": c.value},
			Exporters: []*control.Exporter{{Type: "image"}, {Type: "oci", Attrs: map[string]string{"source-date-epoch": "9"}}},
		})
		if err != nil {
			t.Fatal(err)
		}
		for i, ex := range req.Exporters {
			if !maps.Equal(ex.Attrs, c.want[i]) {
				t.Errorf("%q: exporter %d has %v, want %v", c.value, i, ex.Attrs, c.want[i])
			}
		}
	}
}

func TestWhatHasNoEffectIsWarnedOf(t *testing.T) {
	req, err := ParseRequest(&control.SolveRequest{Ref: "r", FrontendAttrs: map[string]string{"attest:sbom": "", "attest:provenance": "disabled=true"}})
	if err != nil {
		t.Fatal(err)
	}
	all := strings.Join(req.Warnings, "\n")
	if !strings.Contains(all, "sbom") || len(req.Warnings) != 1 {
		t.Errorf("warnings %q", all)
	}
}

// compat: X-5
func TestCaches(t *testing.T) {
	entry := func(typ, ref string) *control.CacheOptionsEntry {
		return &control.CacheOptionsEntry{Type: typ, Attrs: map[string]string{"ref": ref}}
	}
	req, err := ParseRequest(&control.SolveRequest{Ref: "r", Cache: &control.CacheOptions{
		Imports: []*control.CacheOptionsEntry{entry("t", "a/b"), nil}, ImportRefsDeprecated: []string{"c/d"},
		Exports: []*control.CacheOptionsEntry{nil, entry("t", "e/f")}, ExportRefDeprecated: "g/h", ExportAttrsDeprecated: map[string]string{"mode": "max"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range append(req.CacheImports, req.CacheExports...) {
		got = append(got, e.Type+" "+e.Attrs["ref"]+e.Attrs["mode"])
	}
	if want := []string{"t a/b", "registry c/d", "t e/f", "registry g/hmax"}; !slices.Equal(got, want) {
		t.Errorf("caches %q, want %q", got, want)
	}
}

func TestFileRange(t *testing.T) {
	const big = maxFile + 10
	for _, c := range []struct {
		rng          *gwpb.FileRange
		size, off, n int64
		code         codes.Code
	}{
		{nil, 5, 0, 5, 0}, {nil, 0, 0, 0, 0}, {nil, big, 0, 0, codes.ResourceExhausted},
		{&gwpb.FileRange{Offset: 1, Length: 2}, 5, 1, 2, 0}, {&gwpb.FileRange{Offset: 4, Length: 9}, 5, 4, 1, 0},
		{&gwpb.FileRange{Offset: 9, Length: 9}, 5, 5, 0, 0}, {&gwpb.FileRange{Offset: 10, Length: big}, big, 10, maxFile, 0},
		{&gwpb.FileRange{Offset: -1}, 5, 0, 0, codes.InvalidArgument}, {&gwpb.FileRange{Length: big}, big, 0, 0, codes.ResourceExhausted},
	} {
		off, n, err := fileRange("f", c.rng, c.size)
		if off != c.off || n != c.n || status.Code(err) != c.code {
			t.Errorf("%v of %d: %d+%d, %v", c.rng, c.size, off, n, err)
		}
	}
}
