package ops

import (
	"context"
	"path"
	"strings"

	"github.com/kilnbuild/kiln/cache/contenthash"
	"github.com/kilnbuild/kiln/solver"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Facet is one of the things that identify a step by its definition: its
// command, a variable, the owner that it gives to files. A Name occurs once in
// a step.
type Facet struct {
	Name, Value string
	// Private is set if Value must not be kept or shown: it may be a secret, or
	// long.
	Private bool
}

// Facets names what the digest of v's cache map is made of. Steps of equal
// facets may still have different digests; equal digests mean equal facets.
func Facets(v *solver.Vertex) []Facet {
	if f, ok := v.Op.(interface{ facets() []Facet }); ok {
		return f.facets()
	}
	return nil
}

// Kind says what sort of step v is: exec, file, merge, diff, passthrough, or
// the scheme of a source.
func Kind(v *solver.Vertex) string {
	if k, ok := v.Op.(interface{ kind() string }); ok {
		return k.kind()
	}
	return "other"
}

// Walk calls fn for all that v's step reads of an input by content: with its
// path there, and the digest that stands for it. It reads no file, for what is
// walked was digested before the step ran. It does nothing for an input that
// isn't digested.
func Walk(ctx context.Context, v *solver.Vertex, input int, res solver.Result, fn func(path string, sum [32]byte)) error {
	r, ok := v.Op.(interface {
		reads(input int) []fileSelector
	})
	if !ok {
		return nil
	}
	ref, err := refOf(res)
	if err != nil {
		return err
	}
	for _, s := range r.reads(input) {
		if err := contenthash.Walk(ctx, ref, path.Join("/", s.path), s.opts, fn); err != nil {
			return err
		}
	}
	return nil
}

// Removed lists names of files that were lately removed from what res stands
// for, where they are known.
func Removed(res solver.Result) []string {
	ref, err := refOf(res)
	if err != nil {
		return nil
	}
	return contenthash.Removed(ref)
}

// facets collects what identifies an op. Zero values are left out, as they
// are in most keys; that is a facet, too, when the other step has one.
type facets []Facet

func (f *facets) add(name, value string) {
	if value != "" {
		*f = append(*f, Facet{Name: name, Value: value})
	}
}

func (f *facets) private(name, value string) {
	*f = append(*f, Facet{Name: name, Value: value, Private: true})
}

func (f *facets) flag(name string, set bool) {
	if set {
		f.add(name, "on")
	}
}

func (f *facets) platform(p ocispec.Platform) {
	s := p.OS + "/" + p.Architecture
	for _, more := range []string{p.Variant, p.OSVersion} {
		if more != "" {
			s += "/" + more
		}
	}
	if len(p.OSFeatures) > 0 {
		s += "+" + strings.Join(p.OSFeatures, "+")
	}
	f.add("platform", s)
}
