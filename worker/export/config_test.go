package export

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func at(day int) time.Time { return time.Date(2024, 1, day, 0, 0, 0, 0, time.UTC) }

// hist is an entry: a name, "-" before it if it stands for no layer, and the
// day after "@" if it has a time.
func hist(entries ...string) []ocispec.History {
	var out []ocispec.History
	for _, e := range entries {
		name, day, timed := strings.Cut(e, "@")
		h := ocispec.History{EmptyLayer: strings.HasPrefix(name, "-"), CreatedBy: strings.TrimPrefix(name, "-")}
		if timed {
			var d int
			fmt.Sscan(day, &d)
			created := at(d)
			h.Created = &created
		}
		out = append(out, h)
	}
	return out
}

func show(history []ocispec.History) string {
	var out []string
	for _, h := range history {
		s := h.CreatedBy
		if h.EmptyLayer {
			s = "-" + s
		}
		if h.Created != nil {
			s += fmt.Sprintf("@%d", h.Created.Day())
		}
		out = append(out, s)
	}
	return strings.Join(out, " ")
}

func layersAndOrigins(n int) (layers []cache.Layer, from []cache.Origin) {
	for i := range n {
		layers = append(layers, cache.Layer{DiffID: digest.FromString(fmt.Sprint("layer", i))})
		from = append(from, cache.Origin{CreatedAt: at(10 + i), Description: fmt.Sprint("made", i)})
	}
	return layers, from
}

// compat: EXP-053
func TestHistoryAgreesWithLayers(t *testing.T) {
	for _, c := range []struct {
		name   string
		given  []ocispec.History
		layers int
		want   string
	}{
		{"Nothing", nil, 0, ""},
		{"NoHistory", nil, 2, "made0@10 made1@11"},
		{"Complete", hist("a@1", "b@2"), 2, "a@1 b@2"},
		{"TimesFromLayers", hist("a", "b"), 2, "a@10 b@11"},
		{"Missing", hist("a@1"), 3, "a@1 made1@11 made2@12"},
		{"EmptyOnes", hist("-env", "a@1", "-cmd"), 1, "-env@1 a@1 -cmd@1"},
		{"FirstNewLayerGivesTime", hist("base@1", "-env", "new@5", "-cmd"), 2, "base@1 -env@5 new@5 -cmd@5"},
		{"LayersThatDontExist", hist("a@1", "b@2"), 1, "a@1 -b@2"},
		{"MissingAfterEmpty", hist("-env"), 1, "-env@10 made0@10"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, from := layersAndOrigins(c.layers)
			given := show(c.given)
			if got := show(alignHistory(c.given, c.layers, from)); got != c.want {
				t.Errorf("history %q, want %q", got, c.want)
			}
			if show(c.given) != given {
				t.Errorf("the given history was changed to %q", show(c.given))
			}
		})
	}
}

func TestHistoryOfLayersWithoutOrigin(t *testing.T) {
	got := alignHistory(nil, 1, origins(nil, 1))
	if len(got) != 1 || got[0].CreatedBy != "created by buildkit" || got[0].Comment != "buildkit.exporter.image.v0" || got[0].Created != nil {
		t.Errorf("history %+v", got)
	}
}

// compat: EXP-023
func TestEpochClampsWhatIsNew(t *testing.T) {
	base := ocispec.Image{History: hist("base@20", "other@21")}
	raw, err := json.Marshal(base)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, want string }{
		{"base@20 other@21 new@22", "base@20 other@21 new@5"},
		{"base@20 changed@21 other@21", "base@20 changed@5 other@5"},
		{"new@2 late@9", "new@2 late@5"},
		{"untimed", "untimed@5"},
	} {
		history := hist(strings.Fields(c.name)...)
		if err := clampHistory(history, raw, at(5)); err != nil {
			t.Fatal(err)
		}
		if got := show(history); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	if err := clampHistory(hist("a"), []byte("{"), at(5)); err == nil {
		t.Error("a base config that is no JSON was accepted")
	}
}

func TestPatchConfig(t *testing.T) {
	const head = `{"os":"linux","architecture":"amd64","moby.custom":{"b":1,"a":[2]}`
	layers, from := layersAndOrigins(1)
	early := at(5)
	for _, c := range []struct {
		name, config string
		clamp        *time.Time
		created      string
	}{
		{"CreatedFromHistory", head + `}`, nil, `"2024-01-10T00:00:00Z"`},
		{"CreatedKeptAsWritten", head + `,"created":"2024-01-20T00:00:00.000+00:00"}`, nil, `"2024-01-20T00:00:00.000+00:00"`},
		{"CreatedClamped", head + `,"created":"2024-01-20T00:00:00Z"}`, &early, `"2024-01-05T00:00:00Z"`},
		{"CreatedEarlierStays", head + `,"created":"2024-01-02T00:00:00Z"}`, &early, `"2024-01-02T00:00:00Z"`},
		{"CreatedNullStays", head + `,"created":null}`, &early, `null`},
		{"ClampedFromHistory", head + `}`, &early, `"2024-01-05T00:00:00Z"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, err := patchConfig([]byte(c.config), nil, layers, from, c.clamp)
			if err != nil {
				t.Fatal(err)
			}
			var got struct {
				Created json.RawMessage `json:"created"`
				Custom  json.RawMessage `json:"moby.custom"`
				RootFS  ocispec.RootFS  `json:"rootfs"`
			}
			if err := json.Unmarshal(out, &got); err != nil {
				t.Fatal(err)
			}
			if string(got.Created) != c.created {
				t.Errorf("created %s, want %s", got.Created, c.created)
			}
			if string(got.Custom) != `{"b":1,"a":[2]}` {
				t.Errorf("a field that kiln doesn't know became %s", got.Custom)
			}
			if len(got.RootFS.DiffIDs) != 1 || got.RootFS.DiffIDs[0] != layers[0].DiffID || got.RootFS.Type != "layers" {
				t.Errorf("rootfs %+v", got.RootFS)
			}
		})
	}
}

// compat: EXP-141
func TestBadConfigs(t *testing.T) {
	for config, want := range map[string]string{
		`{`:                                     "unexpected end",
		`null`:                                  "os is missing",
		`[]`:                                    "cannot unmarshal",
		`{"os":"linux"}`:                        "architecture is missing",
		`{"architecture":"a"}`:                  "os is missing",
		`{"os":1}`:                              "cannot unmarshal",
		`{"history":[{"created":"yesterday"}]}`: "yesterday",
	} {
		if _, err := patchConfig([]byte(config), nil, nil, nil, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", config, err, want)
		}
	}
}

// compat: EXP-052
func TestDefaultConfigIsOfThePlatform(t *testing.T) {
	raw, err := defaultConfig(&ocispec.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"})
	if err != nil {
		t.Fatal(err)
	}
	var img ocispec.Image
	if err := json.Unmarshal(raw, &img); err != nil {
		t.Fatal(err)
	}
	if img.Architecture != "arm64" || img.Variant != "v8" || len(img.Config.Env) != 1 || img.Config.WorkingDir != "/" {
		t.Errorf("config %s", raw)
	}
}

// Whatever a frontend sends as a config gives a config or an error.
func FuzzPatchConfig(f *testing.F) {
	f.Add([]byte(`{"os":"linux","architecture":"amd64","history":[{"empty_layer":true},{}]}`), []byte(`{"history":[{}]}`))
	f.Add([]byte(`{"os":"linux","architecture":"amd64","created":null,"history":null}`), []byte(`null`))
	layers, from := layersAndOrigins(2)
	epoch := at(5)
	f.Fuzz(func(t *testing.T, config, base []byte) {
		out, err := patchConfig(config, base, layers, from, &epoch)
		if err != nil {
			return
		}
		var img ocispec.Image
		if err := json.Unmarshal(out, &img); err != nil {
			t.Fatalf("%s became %s: %v", config, out, err)
		}
		n := 0
		for _, h := range img.History {
			if !h.EmptyLayer {
				n++
			}
		}
		if n != 2 || len(img.RootFS.DiffIDs) != 2 {
			t.Fatalf("%s became %s: history and layers differ", config, out)
		}
	})
}
