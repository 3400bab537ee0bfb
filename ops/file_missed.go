package ops

import (
	"context"
	"errors"
	"io/fs"
	"path"
	"strings"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/ops/filetree"
)

// copyFrom runs c from the given state to dst. What has been changed in an input
// since that was made, it has lost: by what is known of its content, which isn't
// read again, the copy would be what it no longer is.
func (r *fileRun) copyFrom(ctx context.Context, state int, c *filetree.Copy, dst filetree.Root) error {
	src, err := r.root(ctx, state)
	if err != nil {
		return err
	}
	if state < 0 || state >= len(r.inputs) || r.inputs[state] == nil {
		return c.Run(ctx, src, dst)
	}
	w, err := r.inputs[state].Witness(ctx)
	if err != nil {
		return r.lost(state, err)
	}
	c.Witness = w.Read
	if err = c.Run(ctx, src, dst); errors.Is(err, fs.ErrNotExist) {
		err = missed(ctx, w, c.Src, err)
	}
	return r.lost(state, errors.Join(err, w.Close()))
}

// missed returns why a copy of src doesn't find it, which err says. What isn't there
// was never there, or somebody has removed it after the input was made. What is known
// of an input's content doesn't tell, for it is not read again.
func missed(ctx context.Context, w *cache.Witness, src string, err error) error {
	dir := strings.TrimPrefix(path.Clean("/"+src), "/")
	for dir != "" {
		dir = strings.TrimSuffix(strings.TrimSuffix(dir, path.Base(dir)), "/")
		if changed := w.Dir(ctx, dir); changed != nil {
			return changed
		}
	}
	return err
}
