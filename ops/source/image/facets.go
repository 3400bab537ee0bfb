package image

import (
	"strconv"
	"strings"

	"github.com/kilnbuild/kiln/ops"
)

var _ ops.Fingerprinter = (*Instance)(nil)

// Facets implements ops.Fingerprinter: the image's name, the digest that it
// stands for, once that is known, and what is taken of it.
func (i *Instance) Facets() []ops.Facet {
	name, _, _ := strings.Cut(i.spec.Ref, "@")
	p := i.spec.Platform
	out := []ops.Facet{
		{Name: "image", Value: name},
		{Name: "platform", Value: strings.TrimSuffix(p.OS+"/"+p.Architecture+"/"+p.Variant, "/")},
	}
	if n := i.spec.Limit; n != nil {
		out = append(out, ops.Facet{Name: "number of layers", Value: strconv.Itoa(*n)})
	}
	select {
	case i.turn <- struct{}{}:
		defer func() { <-i.turn }()
	default: // somebody asks the registry at this moment
		return out
	}
	if i.image != nil {
		out = append(out, ops.Facet{Name: "digest", Value: i.image.Root.Digest.String()})
	}
	return out
}
