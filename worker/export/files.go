package export

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/internal/cleanup"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/moby/buildkit/session/filesync"
	"github.com/tonistiigi/fsutil"
	fstypes "github.com/tonistiigi/fsutil/types"
)

// fileOptions are the attributes of local and tar (EXP-040 to -046).
type fileOptions struct {
	split *bool // a directory per platform; nil: when there are several
	epoch epoch
}

func parseFileOptions(typ string, attrs map[string]string) (o fileOptions, err error) {
	for k, v := range attrs {
		switch k {
		case "platform-split":
			o.split = new(bool)
			err = parseBool(k, v, o.split)
		case "source-date-epoch":
			o.epoch, err = parseEpoch(v)
		case "attestation-prefix": // names files that this daemon doesn't make
		case "mode":
			if typ != "local" || (v != "copy" && v != "delete") {
				err = fmt.Errorf("mode %q: must be copy or delete, and goes with type=local", v)
			}
		}
		if err != nil {
			return o, err
		}
	}
	return o, nil
}

// fileExporter sends the result's files to the client: as a folder, or as a tar.
type fileExporter struct {
	cfg  Config
	opts fileOptions
	tar  bool
}

func (e *fileExporter) Name() string {
	if e.tar {
		return "exporting to client tarball"
	}
	return "exporting to client directory"
}

func (e *fileExporter) Export(ctx context.Context, src Source, req Request) (_ Done, err error) {
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()

	tree, err := e.tree(ctx, src, &undo)
	if err != nil {
		return Done{}, err
	}
	caller, err := e.cfg.caller(ctx, req)
	if err != nil {
		return Done{}, err
	}
	if !e.tar {
		return Done{}, sendFiles(ctx, caller, req.Index, tree)
	}
	w, err := filesync.CopyFileWriter(ctx, nil, req.Index, caller)
	if err != nil {
		return Done{}, fmt.Errorf("open the client's output: %w", err)
	}
	done := progress.From(ctx).Begin("sending tarball")
	if err := fsutil.WriteTar(ctx, tree, w); err != nil {
		return Done{}, errors.Join(fmt.Errorf("send tarball: %w", err), w.Close())
	}
	if err := w.Close(); err != nil {
		return Done{}, fmt.Errorf("send tarball: %w", err)
	}
	done()
	return Done{}, nil
}

// tree is the result's files; with several platforms, in a directory each or
// laid over one another where nothing collides.
func (e *fileExporter) tree(ctx context.Context, src Source, undo *cleanup.Stack) (fsutil.FS, error) {
	all, isMap, err := parts(src)
	if err != nil {
		return nil, err
	}
	split := isMap
	if e.opts.split != nil {
		split = *e.opts.split
	}
	var dirs []fsutil.Dir
	for _, p := range all {
		clamp, err := e.opts.epoch.or(src.Metadata, p.id)
		if err != nil {
			return nil, err
		}
		tree, err := openTree(ctx, p.ref, clamp.time, undo)
		if err != nil {
			return nil, err
		}
		st := &fstypes.Stat{Mode: uint32(os.ModeDir | 0o755), Path: strings.ReplaceAll(p.id, "/", "_")}
		if clamp.time != nil {
			st.ModTime = clamp.time.UnixNano()
		}
		dirs = append(dirs, fsutil.Dir{FS: tree, Stat: st})
	}
	switch {
	case split && dirs[0].Stat.Path == "":
		return nil, errors.New("platform-split: the result doesn't say its platform")
	case split:
		return fsutil.SubDirFS(dirs)
	case len(dirs) == 1:
		return dirs[0].FS, nil
	}
	return nil, errors.New("platform-split=false: files of several platforms would overwrite one another; leave it out")
}

// openTree makes ref's files readable until undo runs.
func openTree(ctx context.Context, ref *cache.Ref, clamp *time.Time, undo *cleanup.Stack) (fsutil.FS, error) {
	view, err := ref.Open(ctx)
	if err != nil {
		return nil, fmt.Errorf("open the result: %w", err)
	}
	undo.Add(view.Close)
	root, err := os.OpenRoot(view.Path())
	if err != nil {
		return nil, fmt.Errorf("open the result: %w", err)
	}
	undo.Add(root.Close)
	watched := watchRoot(root)
	tree, err := fsutil.NewFilterFS(fsutil.NewRootFS(watched), &fsutil.FilterOpt{Map: func(_ string, st *fstypes.Stat) fsutil.MapResult {
		if clamp != nil {
			st.ModTime = clamp.UnixNano()
		}
		if fs.FileMode(st.Mode)&fs.ModeSocket != 0 {
			return fsutil.MapResultExclude // no client can make one
		}
		return fsutil.MapResultKeep
	}})
	return wholeTree{tree, watched.dirs}, err
}

// byteCount reports what was sent so far as one status.
type byteCount struct {
	scope   progress.Scope
	started time.Time
	last    atomic.Int64 // unix nanoseconds of the last report
}

func (c *byteCount) report(n int, end bool) {
	now := time.Now()
	if last := c.last.Load(); !end && now.UnixNano()-last < int64(100*time.Millisecond) {
		return
	}
	c.last.Store(now.UnixNano())
	st := &progress.Status{ID: "copying files", Current: int64(n), Timestamp: now, Started: &c.started}
	if end {
		st.Completed = &now
	}
	c.scope.Write(progress.Event{Status: st})
}
