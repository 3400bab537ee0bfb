package build

import (
	"maps"
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
		"Ref is missing":      {},
		"Ref has 300 bytes":   {Ref: strings.Repeat("r", 300)},
		"exclude each other":  {Ref: "r", Frontend: "f", Definition: &pb.Definition{Def: [][]byte{{1}}}},
		`FrontendInputs["i"]`: {Ref: "r", FrontendInputs: map[string]*pb.Definition{"i": nil}},
		"Exporters[1].Type":   {Ref: "r", Exporters: []*control.Exporter{{Type: "image"}, nil}},
		"Cache.Exports":       {Ref: "r", Cache: &control.CacheOptions{Exports: []*control.CacheOptionsEntry{{Type: "inline"}}}},
		"SourcePolicy":        {Ref: "r", SourcePolicy: &spb.Policy{Rules: []*spb.Rule{{}}}},
		"SourcePolicySession": {Ref: "r", SourcePolicySession: "s"},
		"ProxyNetwork":        {Ref: "r", ProxyNetwork: true},
		"30, not 20":          {Ref: "r", CompatibilityVersion: 20},
		"upgrade":             {Ref: "r", CompatibilityVersion: 31},
		"not one of":          {Ref: "r", CompatibilityVersion: -1},
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
	req, err := ParseRequest(&control.SolveRequest{
		Ref:           "r",
		FrontendAttrs: map[string]string{"attest:sbom": "", "attest:provenance": "disabled=true"},
		Cache:         &control.CacheOptions{Imports: []*control.CacheOptionsEntry{{Type: "registry", Attrs: map[string]string{"ref": "a/b"}}, nil}, ImportRefsDeprecated: []string{"c/d"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	all := strings.Join(req.Warnings, "\n")
	for _, want := range []string{"a/b", "c/d", "sbom"} {
		if !strings.Contains(all, want) {
			t.Errorf("no warning of %s in %q", want, all)
		}
	}
	if strings.Contains(all, "provenance") || len(req.Warnings) != 4 {
		t.Errorf("warnings %q", all)
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
