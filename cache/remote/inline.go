package remote

import (
	"encoding/json"
	"fmt"
	"maps"
	"time"

	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// InlineField is where an image's config has the cache: the records of a Config,
// as JSON, in base64. The layers are those of the image, each on top of the one
// before.
const InlineField = "moby.buildkit.cache.v0"

// maxNesting bounds indexes within indexes.
const maxNesting = 4

// addInline adds the caches that the images below d have inside. It reports
// whether there is one.
func (x *Index) addInline(d document, read Reader, nesting int) (found bool, err error) {
	if d.Config != nil {
		return x.addImage(d, read)
	}
	if nesting == maxNesting {
		return false, fmt.Errorf("its indexes are nested more than %d deep", maxNesting)
	}
	for _, m := range d.Manifests {
		below, err := readDocument(m, read)
		if err != nil {
			return false, err
		}
		one, err := x.addInline(below, read, nesting+1)
		if err != nil {
			return false, err
		}
		found = found || one
	}
	return found, nil
}

func (x *Index) addImage(d document, read Reader) (found bool, err error) {
	data, err := read(*d.Config)
	if err != nil {
		return false, err
	}
	var img struct {
		RootFS struct {
			DiffIDs []digest.Digest `json:"diff_ids"`
		} `json:"rootfs"`
		History []ocispec.History `json:"history"`
		Cache   []byte            `json:"moby.buildkit.cache.v0"`
	}
	if err := json.Unmarshal(data, &img); err != nil {
		return false, fmt.Errorf("the image config %s isn't well-formed: %w", d.Config.Digest, err)
	}
	if img.Cache == nil {
		return false, nil
	}
	if len(img.RootFS.DiffIDs) != len(d.Layers) {
		return false, fmt.Errorf("the image has %d layers, its config says %d", len(d.Layers), len(img.RootFS.DiffIDs))
	}
	var c Config
	if err := json.Unmarshal(img.Cache, &c.Records); err != nil {
		return false, fmt.Errorf("the cache in the image config %s isn't well-formed: %w", d.Config.Digest, err)
	}
	blobs, made := make([]ocispec.Descriptor, len(d.Layers)), times(img.History)
	for i, l := range d.Layers {
		l.Annotations = maps.Clone(l.Annotations)
		if l.Annotations == nil {
			l.Annotations = map[string]string{}
		}
		l.Annotations[labels.LabelUncompressed] = img.RootFS.DiffIDs[i].String()
		if i < len(made) {
			l.Annotations[createdAt] = made[i]
		}
		blobs[i] = l
		c.Layers = append(c.Layers, Layer{Blob: l.Digest, Parent: i - 1})
	}
	return true, x.Add(c, blobs)
}

// times are when layers were made, "" where the history doesn't say.
func times(history []ocispec.History) (out []string) {
	for _, h := range history {
		switch {
		case h.EmptyLayer:
		case h.Created == nil:
			out = append(out, "")
		default:
			out = append(out, h.Created.UTC().Format(time.RFC3339Nano))
		}
	}
	return out
}
