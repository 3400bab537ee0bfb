package dockerfile

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/frontend"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
)

// outcome is everything that a frontend did with a case.
type outcome struct {
	Error      string            `json:"error"`
	ErrorLines []string          `json:"errorLines"`
	Metadata   map[string]string `json:"metadata"`
	// Results are the op digests by platform; Ops, by platform and digest, is
	// what is said of them.
	Results  map[string][]string `json:"results"`
	Ops      map[string]opInfo   `json:"ops"`
	Warnings []string            `json:"warnings"`
	Solves   []string            `json:"solves"`
	Resolves []string            `json:"resolves"`

	defs map[string]*pb.Definition
}

type opInfo struct {
	Name        string `json:"name"`
	Command     string `json:"command"`
	Lines       string `json:"lines"`
	IgnoreCache bool   `json:"ignoreCache"`
	Group       string `json:"group"`
	Resources   string `json:"resources"`
}

func runCase(t testing.TB, c testCase) *outcome {
	t.Helper()
	bridge := newBridge(t, c.files)
	o := &outcome{defs: map[string]*pb.Definition{}}
	res, err := Frontend{}.Solve(t.Context(), bridge, c.request(t))
	if err != nil {
		o.Error = err.Error()
		for _, s := range errdefs.Sources(err) {
			o.ErrorLines = append(o.ErrorLines, showRanges(s.Ranges))
		}
	} else {
		o.addResult(res)
	}
	if err != nil {
		// The ignore file may or may not have been read meanwhile.
		bridge.solves = slices.DeleteFunc(bridge.solves, func(s string) bool { return strings.Contains(s, "load .dockerignore") })
	}
	slices.Sort(bridge.warnings)
	slices.Sort(bridge.solves)
	slices.Sort(bridge.resolves)
	o.Warnings, o.Solves, o.Resolves = bridge.warnings, bridge.solves, bridge.resolves
	return o
}

func (o *outcome) addResult(res *frontend.Result) {
	o.Metadata = map[string]string{}
	for k, v := range res.Metadata {
		o.Metadata[k] = string(v)
	}
	refs := maps.Clone(res.Refs)
	if refs == nil && o.Metadata[configKey] != "" {
		refs = map[string]frontend.Ref{"": res.Ref}
	}
	for id, ref := range refs {
		if o.Results == nil {
			o.Results = map[string][]string{}
		}
		o.Results[id] = []string{}
		if ref != nil {
			o.addDefinition(id, ref.Definition())
		}
	}
}

func (o *outcome) addDefinition(id string, def *pb.Definition) {
	o.defs[id] = def
	if o.Ops == nil {
		o.Ops = map[string]opInfo{}
	}
	for _, dt := range def.Def {
		d := digest.FromBytes(dt).String()
		o.Results[id] = append(o.Results[id], d)
		md := def.Metadata[d]
		info := opInfo{
			Name:        md.GetDescription()["llb.customname"],
			Command:     md.GetDescription()["com.docker.dockerfile.v1.command"],
			IgnoreCache: md.GetIgnoreCache(),
		}
		if g := md.GetProgressGroup(); g != nil {
			info.Group = fmt.Sprintf("%s weak=%v", g.Name, g.Weak)
		}
		if r := md.GetLinuxResources(); r != nil {
			info.Resources = fmt.Sprint(r.Memory, r.MemorySwap, r.CpuShares, r.CpuPeriod, r.CpuQuota, r.CpusetCpus, r.CpusetMems)
		}
		var lines []string
		for _, l := range def.Source.GetLocations()[d].GetLocations() {
			lines = append(lines, showRanges(l.Ranges))
		}
		info.Lines = strings.Join(lines, ";")
		o.Ops[strings.TrimSpace(id+" "+d)] = info
	}
	slices.Sort(o.Results[id])
}

// TestReference compares with what the reference frontend did with each case
// (testdata/README.md). Cases that begin with "differs:" say in what we differ
// on purpose; they must differ.
//
// Where files are found, which frontend is asked, attributes:
// compat: DF-001, DF-002, DF-003, DF-004, DF-005, DF-006, DF-007, DF-008, DF-009, DF-010, DF-012, DF-013
// compat: DF-020, DF-023, DF-024, DF-025, DF-026, DF-027, DF-028, DF-029, DF-030, DF-031, DF-032
// compat: DF-034, DF-035, DF-036, DF-037, DF-039, DF-040, DF-041, DF-042, DF-044
//
// Arguments and expansion:
// compat: DF-050, DF-053, DF-054, DF-060, DF-061, DF-062, DF-063
//
// Instructions:
// compat: DF-070, DF-071, DF-073, DF-074, DF-075, DF-076, DF-077, DF-078, DF-079, DF-080, DF-081
// compat: DF-083, DF-084, DF-085, DF-086, DF-087, DF-089, DF-090, DF-091, DF-092, DF-093
// compat: DF-095, DF-096, DF-097, DF-098, DF-099, DF-100, DF-101, DF-102, DF-103, DF-104, DF-105, DF-106
//
// Ignore files and contexts:
// compat: DF-110, DF-111, DF-112, DF-113, DF-120, DF-121, DF-122, DF-124, DF-125, DF-126
//
// Image configs, results and names:
// compat: DF-130, DF-131, DF-132, DF-133, DF-134, DF-135, DF-136
//
// Lint rules:
// compat: DF-L01, DF-L02, DF-L03, DF-L04, DF-L05, DF-L06, DF-L07, DF-L08, DF-L09, DF-L10, DF-L11, DF-L12
// compat: DF-L13, DF-L14, DF-L15, DF-L16, DF-L17, DF-L18, DF-L19, DF-L20, DF-L21, DF-L22, DF-L23
//
// Questions about the Dockerfile and capabilities:
// compat: GW-080, GW-081, GW-082, GW-083, GW-084, GW-086, GW-090, GW-091, GW-092, GW-093, GW-094
func TestReference(t *testing.T) {
	dt, err := os.ReadFile("testdata/reference.json")
	if err != nil {
		t.Fatal(err)
	}
	var want map[string]*outcome
	if err := json.Unmarshal(dt, &want); err != nil {
		t.Fatal(err)
	}
	for _, c := range loadCases(t) {
		t.Run(c.name, func(t *testing.T) {
			w, ok := want[c.name]
			if !ok {
				t.Fatal("the reference was not recorded")
			}
			if w.Error != "" {
				w.Solves = slices.DeleteFunc(w.Solves, func(s string) bool { return strings.Contains(s, "load .dockerignore") })
			}
			got := runCase(t, c)
			got.dropLines(w)
			diffs := compare(got, w)
			if strings.HasPrefix(c.about, "differs:") {
				if len(diffs) == 0 {
					t.Error("no longer differs")
				}
				return
			}
			for _, d := range diffs {
				t.Error(d)
			}
		})
	}
	if cases := loadCases(t); len(cases) != len(want) {
		t.Errorf("%d cases, %d recorded", len(cases), len(want))
	}
}

// dropLines forgets where images stand that mounts name, and what ADD fetches:
// the reference doesn't tell, so that an error about one would point nowhere.
func (o *outcome) dropLines(ref *outcome) {
	for k, info := range o.Ops {
		want := ref.Ops[k].Lines
		if (strings.Contains(info.Name, "FROM ") || strings.Contains(info.Name, "ADD ")) && strings.HasPrefix(info.Lines, want) {
			info.Lines = want
			o.Ops[k] = info
		}
	}
}

func compare(got, want *outcome) (diffs []string) {
	g, w := reflect.ValueOf(*got), reflect.ValueOf(*want)
	for i := range g.NumField() {
		name := g.Type().Field(i).Name
		if name == "defs" {
			continue
		}
		a, b := g.Field(i), w.Field(i)
		if a.Kind() != reflect.String && a.Len() == 0 && b.Len() == 0 {
			continue
		}
		if a.Kind() == reflect.Map {
			diffs = append(diffs, compareMaps(name, a, b)...)
		} else if !reflect.DeepEqual(a.Interface(), b.Interface()) {
			diffs = append(diffs, fmt.Sprintf("%s:\n got %q\nwant %q", name, a, b))
		}
	}
	return diffs
}

func compareMaps(name string, got, want reflect.Value) (diffs []string) {
	keys := map[string]reflect.Value{}
	for _, k := range append(got.MapKeys(), want.MapKeys()...) {
		keys[k.String()] = k
	}
	for _, k := range slices.Sorted(maps.Keys(keys)) {
		a, b := got.MapIndex(keys[k]), want.MapIndex(keys[k])
		if !a.IsValid() || !b.IsValid() || !reflect.DeepEqual(a.Interface(), b.Interface()) {
			diffs = append(diffs, fmt.Sprintf("%s[%s]:\n got %+v\nwant %+v", name, k, a, b))
		}
	}
	return diffs
}
