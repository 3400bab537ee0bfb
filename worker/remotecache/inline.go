package remotecache

import (
	"context"

	"github.com/kilnbuild/kiln/cache/remote"
)

// Inline returns the cache of b as it stands in the config of the image that is
// made of its one result: the steps whose results have only layers of the image.
// It is nil if there are none (EXP-070).
func Inline(ctx context.Context, b Build) ([]byte, error) {
	image := idsOf(b.Results)
	places := map[*remote.Step]remote.Place{}
	for _, s := range b.Steps {
		for _, rec := range s.Results {
			ref, err := b.Load(ctx, rec)
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			if err != nil {
				continue // it is gone, and makes room for the next
			}
			p := remote.Place{CreatedAt: rec.CreatedAt}
			own := ids(ref)
			ref.Release()
			if within(own, image) {
				for _, id := range own {
					p.Layers = append(p.Layers, image[id])
				}
				places[s] = p
			}
			break
		}
	}
	return remote.EncodeInline(b.Steps, places)
}
