package contenthash

import (
	"context"

	"github.com/kilnbuild/kiln/cache"
)

// Walk calls fn for every file and directory header that Checksum of the same
// arguments digests, in order, with its path in ref as it was asked for ("" is
// the root) and the digest that stands for it alone. After Checksum it reads no
// file. fn must not call this package.
func Walk(ctx context.Context, ref *cache.Ref, p string, opts Options, fn func(path string, sum [32]byte)) error {
	if ref == nil {
		return nil
	}
	return walk(ctx, refRecord{ref}, p, opts, fn)
}

func walk(ctx context.Context, rec record, p string, opts Options, fn func(path string, sum [32]byte)) error {
	return scan(ctx, rec, func(s *scanner) error {
		if opts.selects() {
			return s.walkSelection(p, opts, fn)
		}
		n, err := s.filled(keyPath(p), opts.FollowLinks)
		if err != nil {
			return err
		}
		n.each(keyPath(p), func(n *node, at string) bool {
			fn(at, n.head)
			return true
		})
		return nil
	})
}

func (s *scanner) walkSelection(p string, opts Options, fn func(path string, sum [32]byte)) error {
	sel, err := s.selection(p, opts)
	if err != nil {
		return err
	}
	for _, p := range sel.picked {
		head, err := sel.head(p)
		if err != nil {
			return err
		}
		fn(p.path, head)
	}
	return nil
}
