package http

import (
	"context"
	"errors"

	"github.com/kilnbuild/kiln/cache"
)

// reuse gives the file that f is about, which another op of the build got, as
// this op wants it.
func (i *instance) reuse(ctx context.Context, f *found) (_ *cache.Ref, _ *found, err error) {
	place, known, leave, err := i.arrive(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer leave()
	a := f.answer
	a.Name = i.spec.name(a.Offered)
	for _, k := range known {
		if k.answer == a {
			return k.ref.Clone(), &k.found, nil
		}
	}
	other, err := i.opts.Cache.Get(ctx, f.record)
	if err != nil {
		return nil, nil, err
	}
	defer other.Release()
	view, err := other.Open(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer func() { err = errors.Join(err, view.Close()) }()
	file, err := view.OpenFile(f.Name, 0, 0)
	if err != nil {
		return nil, nil, err
	}
	defer file.Close()
	return i.save(ctx, place, a, file)
}
