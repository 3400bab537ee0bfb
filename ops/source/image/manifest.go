package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// errSchema1 is what images get that no one makes any more.
var errSchema1 = errors.New("its manifest has Docker schema version 1, which isn't supported; push the image again with a current tool")

// document is a manifest or an index; which of them, isIndex says.
type document struct {
	ocispec.Manifest
	Manifests []ocispec.Descriptor `json:"manifests"`
	isIndex   bool
}

// parseDocument reads a manifest or index and refuses what could be read as
// both. mediaType is what it was announced as.
func parseDocument(data []byte, mediaType string) (*document, error) {
	var shape struct {
		SchemaVersion int             `json:"schemaVersion"`
		MediaType     string          `json:"mediaType"`
		Config        json.RawMessage `json:"config"`
		Layers        json.RawMessage `json:"layers"`
		Manifests     json.RawMessage `json:"manifests"`
		FSLayers      json.RawMessage `json:"fsLayers"`
	}
	if err := json.Unmarshal(data, &shape); err != nil {
		return nil, fmt.Errorf("its manifest isn't valid JSON: %w", err)
	}
	if shape.SchemaVersion == 1 || shape.FSLayers != nil {
		return nil, errSchema1
	}
	single := shape.Config != nil || shape.Layers != nil
	index := shape.Manifests != nil
	switch {
	case single && index:
		return nil, errors.New("its manifest is ambiguous: it lists both layers and manifests")
	case !single && !index:
		return nil, fmt.Errorf("it is neither an image manifest nor an index (announced as %q)", mediaType)
	}
	for _, mt := range []string{shape.MediaType, mediaType} {
		if single && images.IsIndexType(mt) || index && images.IsManifestType(mt) {
			return nil, fmt.Errorf("its manifest doesn't have the form of its media type %s", mt)
		}
	}
	doc := &document{isIndex: index}
	if err := json.Unmarshal(data, doc); err != nil {
		return nil, fmt.Errorf("its manifest isn't well-formed: %w", err)
	}
	return doc, nil
}

// attestationKey marks the entries of an index that aren't images.
const attestationKey = "vnd.docker.reference.type"

// choose returns the entries of an index that may be for platform, best first.
// Entries that don't say what they are for come in only when no other fits.
func choose(list []ocispec.Descriptor, platform ocispec.Platform) ([]ocispec.Descriptor, error) {
	match := platforms.Only(platform)
	var fit, silent []ocispec.Descriptor
	var have []string
	for _, d := range list {
		switch {
		case d.Annotations[attestationKey] != "":
		case d.Platform == nil:
			silent = append(silent, d)
		default:
			have = append(have, platforms.FormatAll(*d.Platform))
			if match.Match(*d.Platform) {
				fit = append(fit, d)
			}
		}
	}
	slices.SortStableFunc(fit, func(a, b ocispec.Descriptor) int {
		switch {
		case match.Less(*a.Platform, *b.Platform):
			return -1
		case match.Less(*b.Platform, *a.Platform):
			return 1
		}
		return 0
	})
	if len(fit) > 0 {
		return fit[:1], nil
	}
	if len(silent) > 0 {
		return silent, nil
	}
	return nil, noMatch(platform, have)
}

func noMatch(platform ocispec.Platform, have []string) error {
	slices.Sort(have)
	return fmt.Errorf("it has no image for %s, only for %s", platforms.FormatAll(platform), strings.Join(slices.Compact(have), ", "))
}
