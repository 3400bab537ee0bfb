package dockerfile

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/encoding/protojson"
)

var update = flag.Bool("update", false, "rewrite testdata/golden")

// TestGolden shows what every case becomes in a form that can be read.
func TestGolden(t *testing.T) {
	for _, c := range loadCases(t) {
		t.Run(c.name, func(t *testing.T) {
			got := dump(t, runCase(t, c))
			file := filepath.Join("testdata/golden", c.name+".golden")
			if *update {
				if err := os.WriteFile(file, got, 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("differs from %s (go test -update rewrites it):\n%s", file, firstDifference(string(got), string(want)))
			}
		})
	}
}

func firstDifference(got, want string) string {
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range max(len(g), len(w)) {
		a, b := "(end)", "(end)"
		if i < len(g) {
			a = g[i]
		}
		if i < len(w) {
			b = w[i]
		}
		if a != b {
			return fmt.Sprintf("line %d\n got %s\nwant %s", i+1, a, b)
		}
	}
	return "no line differs"
}

// dump writes an outcome with ops numbered instead of digested.
func dump(t *testing.T, o *outcome) []byte {
	var b bytes.Buffer
	if o.Error != "" {
		fmt.Fprintf(&b, "error: %s\n", o.Error)
		fmt.Fprintf(&b, "lines: %s\n", strings.Join(o.ErrorLines, " "))
	}
	for _, w := range o.Warnings {
		fmt.Fprintf(&b, "warning: %s\n", w)
	}
	for _, r := range o.Resolves {
		fmt.Fprintf(&b, "resolve: %s\n", r)
	}
	for _, id := range slices.Sorted(maps.Keys(o.Results)) {
		fmt.Fprintf(&b, "\nresult %s\n", id)
		if def := o.defs[id]; def != nil {
			dumpDefinition(t, &b, id, def, o.Ops)
		}
	}
	for _, k := range slices.Sorted(maps.Keys(o.Metadata)) {
		fmt.Fprintf(&b, "\nmetadata %s\n%s\n", k, indent(o.Metadata[k]))
	}
	return b.Bytes()
}

func dumpDefinition(t *testing.T, b *bytes.Buffer, id string, def *pb.Definition, ops map[string]opInfo) {
	number := map[string]int{}
	for i, dt := range def.Def {
		var op pb.Op
		if err := op.UnmarshalVT(dt); err != nil {
			t.Fatal(err)
		}
		var inputs []string
		for _, in := range op.Inputs {
			inputs = append(inputs, fmt.Sprintf("%d.%d", number[in.Digest], in.Index))
		}
		dgst := digest.FromBytes(dt).String()
		number[dgst] = i
		info := ops[strings.TrimSpace(id+" "+dgst)]
		fmt.Fprintf(b, "%d. inputs [%s] lines [%s] %s\n", i, strings.Join(inputs, " "), info.Lines, info.Name)
		if info.IgnoreCache {
			fmt.Fprintln(b, "   ignore cache")
		}
		if info.Group != "" {
			fmt.Fprintf(b, "   group %s\n", info.Group)
		}
		op.Inputs, op.Constraints = nil, nil
		js, err := protojson.Marshal(&op)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(b, indent(string(js)))
	}
}

// indent formats JSON with sorted keys; other text stays as it is.
func indent(text string) string {
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		return text
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("   ", "  ")
	if err := enc.Encode(v); err != nil {
		return text
	}
	return "   " + strings.TrimSuffix(b.String(), "\n")
}
