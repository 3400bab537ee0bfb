package export

import (
	"bytes"
	"errors"

	"github.com/kilnbuild/kiln/internal/cleanup"
	"github.com/tonistiigi/fsutil"
)

// tarOf returns the files of what type=tar would send.
func (e *env) tarOf(attrs map[string]string, src Source) (_ map[string]string, err error) {
	e.t.Helper()
	opts, err := parseFileOptions("tar", attrs)
	if err != nil {
		return nil, err
	}
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	tree, err := (&fileExporter{cfg: e.cfg, opts: opts, tar: true}).tree(e.t.Context(), src, &undo)
	if err != nil {
		return nil, err
	}
	var buf bytes.Buffer
	if err := fsutil.WriteTar(e.t.Context(), tree, &buf); err != nil {
		return nil, err
	}
	return readTar(e.t, buf.Bytes()), nil
}
