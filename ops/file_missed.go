package ops

import (
	"context"
	"errors"
	"io/fs"
	"path"
	"strings"
)

// missed returns why a copy of src from the given state doesn't find it, which
// err says. What isn't there was never there, or somebody has removed it from an
// input after that was made: then the input is lost. What is known of an input's
// content doesn't tell, for it is not read again.
func (r *fileRun) missed(ctx context.Context, state int, src string, err error) error {
	if state < 0 || state >= len(r.inputs) || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	w, werr := r.inputs[state].Witness(ctx)
	if werr != nil {
		return errors.Join(r.lost(state, werr), err)
	}
	dir := strings.TrimPrefix(path.Clean("/"+src), "/")
	for dir != "" {
		dir = strings.TrimSuffix(strings.TrimSuffix(dir, path.Base(dir)), "/")
		if changed := w.Dir(ctx, dir); changed != nil {
			return errors.Join(r.lost(state, changed), w.Close())
		}
	}
	return errors.Join(err, w.Close())
}
