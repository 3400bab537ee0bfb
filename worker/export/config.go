package export

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/cache/remote"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// defaultConfig is the config of results whose frontend gave none (EXP-052).
func defaultConfig(p *ocispec.Platform) ([]byte, error) {
	img := ocispec.Image{Platform: *p, RootFS: ocispec.RootFS{Type: "layers"}}
	img.Config.WorkingDir = "/"
	img.Config.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	return json.Marshal(img)
}

// origins returns those of the topmost n layers of ref, lowest first; a missing
// one is the zero value.
func origins(ref *cache.Ref, n int) []cache.Origin {
	all := ref.Origins()
	if len(all) > n {
		all = all[len(all)-n:]
	}
	return append(all, make([]cache.Origin, n-len(all))...)
}

// patchConfig makes the frontend's config agree with the layers: diff IDs, a
// history entry per layer, times, clamped to the epoch if there is one. Fields
// that kiln doesn't know pass through (EXP-051).
func patchConfig(config, base []byte, layers []cache.Layer, from []cache.Origin, clamp *time.Time) ([]byte, error) {
	var img ocispec.Image
	if err := json.Unmarshal(config, &img); err != nil {
		return nil, fmt.Errorf("image config of the result: %w", err)
	}
	fields := map[string]json.RawMessage{}
	if err := json.Unmarshal(config, &fields); err != nil {
		return nil, fmt.Errorf("image config of the result: %w", err)
	}
	switch {
	case img.OS == "":
		return nil, errors.New("image config of the result: os is missing")
	case img.Architecture == "":
		return nil, errors.New("image config of the result: architecture is missing")
	}
	rootfs := ocispec.RootFS{Type: "layers", DiffIDs: make([]digest.Digest, len(layers))}
	for i, l := range layers {
		rootfs.DiffIDs[i] = l.DiffID
	}
	history := alignHistory(img.History, len(layers), from)
	if clamp != nil {
		if err := clampHistory(history, base, *clamp); err != nil {
			return nil, err
		}
	}
	patch := map[string]any{"rootfs": rootfs, "history": history}
	switch _, given := fields["created"]; {
	case !given:
		patch["created"] = lastCreated(history)
	case clamp != nil && img.Created != nil && img.Created.After(*clamp):
		patch["created"] = clamp
	}
	for name, v := range patch {
		raw, err := json.Marshal(v)
		if err != nil {
			return nil, fmt.Errorf("image config of the result: %s: %w", name, err)
		}
		fields[name] = raw
	}
	return json.Marshal(fields)
}

// withInline puts build cache into a config, in the place of any that came with
// it.
func withInline(config, cache []byte) ([]byte, error) {
	if cache == nil && !bytes.Contains(config, []byte(remote.InlineField)) {
		return config, nil
	}
	fields := map[string]json.RawMessage{}
	if err := json.Unmarshal(config, &fields); err != nil {
		return nil, fmt.Errorf("image config of the result: %w", err)
	}
	delete(fields, remote.InlineField)
	if cache != nil {
		raw, err := json.Marshal(cache)
		if err != nil {
			return nil, fmt.Errorf("inline cache: %w", err)
		}
		fields[remote.InlineField] = raw
	}
	return json.Marshal(fields)
}

// lastCreated is the time of the last entry that has one.
func lastCreated(history []ocispec.History) (out *time.Time) {
	for _, h := range history {
		if h.Created != nil {
			out = h.Created
		}
	}
	return out
}

// alignHistory returns history with exactly n entries that stand for layers,
// every entry with a time.
func alignHistory(history []ocispec.History, n int, from []cache.Origin) []ocispec.History {
	out := append([]ocispec.History{}, history...)
	layer := 0
	for i := range out {
		if out[i].EmptyLayer {
			continue
		}
		if layer == n { // the config speaks of layers that don't exist
			out[i].EmptyLayer = true
			continue
		}
		if out[i].Created == nil && !from[layer].CreatedAt.IsZero() {
			out[i].Created = &from[layer].CreatedAt
		}
		layer++
	}
	for ; layer < n; layer++ {
		h := ocispec.History{CreatedBy: from[layer].Description, Comment: "buildkit.exporter.image.v0"}
		if h.CreatedBy == "" {
			h.CreatedBy = "created by buildkit"
		}
		if !from[layer].CreatedAt.IsZero() {
			h.Created = &from[layer].CreatedAt
		}
		out = append(out, h)
	}
	fillTimes(out)
	return out
}

// fillTimes gives entries without a time that of the nearest layer: the first
// new layer for those before it, else the layer before.
func fillTimes(history []ocispec.History) {
	var current *time.Time
	missing := false
	for _, h := range history {
		if h.Created == nil {
			missing = true
			continue
		}
		current = h.Created
		if missing {
			break
		}
	}
	missing = false
	for i := range history {
		if history[i].Created == nil {
			missing = true
			history[i].Created = current
		} else if missing {
			current = history[i].Created
		}
	}
}

// clampHistory bounds the times of what is new over the base image's history.
func clampHistory(history []ocispec.History, base []byte, to time.Time) error {
	var img ocispec.Image
	if len(base) > 0 {
		if err := json.Unmarshal(base, &img); err != nil {
			return fmt.Errorf("config of the base image: %w", err)
		}
	}
	inherited := true
	for i := range history {
		inherited = inherited && i < len(img.History) && reflect.DeepEqual(history[i], img.History[i])
		if !inherited && (history[i].Created == nil || history[i].Created.After(to)) {
			history[i].Created = &to
		}
	}
	return nil
}
