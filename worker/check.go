package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/cache/keys"
	"github.com/kilnbuild/kiln/internal/cleanup"
	"github.com/kilnbuild/kiln/ops"
)

// Report is what Check found; nothing is wrong if Problems is empty.
type Report struct {
	Cache    *cache.Report
	Keys     keys.Counts
	Problems []string
}

// String counts what was looked at.
func (r Report) String() string {
	return fmt.Sprintf("%d records, %d snapshots, %d blobs, %d images, %d bytes; %d links between keys, %d results; %d problems",
		r.Cache.Records, r.Cache.Snapshots, r.Cache.Blobs, r.Cache.Images, r.Cache.Bytes, r.Keys.Links, r.Keys.Results, len(r.Problems))
}

// Check verifies the state under root, of a worker that isn't running: the
// database file, every record with its parents, snapshots and blobs, and every
// key. What a crash left without a record is swept first, as at every start.
// deep also reads all blobs. The error is about checking, not about what is
// found.
func Check(ctx context.Context, root string, deep bool) (_ Report, err error) {
	if _, err := os.Stat(filepath.Join(root, "kiln.db")); err != nil {
		return Report{}, fmt.Errorf("%s holds no state of kilnd: %w", root, err)
	}
	w := &Worker{cfg: Config{Root: root, Log: slog.New(slog.DiscardHandler)}}
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	r := Report{}
	warn := func(msg string, args ...any) {
		r.Problems = append(r.Problems, strings.TrimSpace(fmt.Sprintln(append([]any{msg}, args...)...)))
	}
	if err := w.openFiles(&undo, warn); err != nil {
		return Report{}, err
	}
	if err := w.store.Check(); err != nil {
		r.Problems = append(r.Problems, err.Error())
	}
	// Before the cache opens: it drops records of files that are gone.
	problems, err := w.checkFiles(ctx, deep)
	if err != nil {
		return Report{}, err
	}
	r.Problems = append(r.Problems, problems...)
	if err := w.openCache(ctx, &undo, nil); err != nil {
		return Report{}, err
	}
	if r.Cache, err = w.cache.Check(ctx, deep); err != nil {
		return r, err
	}
	r.Problems = append(r.Problems, r.Cache.Problems...)
	counts, dangling := keys.Open(w.store).Check(func(id string) bool {
		ref, err := ops.Results{Cache: w.cache}.Load(ctx, id)
		if err != nil {
			return false
		}
		ref.Release()
		return true
	})
	r.Keys, r.Problems = counts, append(r.Problems, dangling...)
	return r, nil
}

// checkFiles sweeps what a crash left and compares the rest with its records.
func (w *Worker) checkFiles(ctx context.Context, deep bool) (problems []string, err error) {
	if _, err := w.snapshots.Sweep(ctx); err != nil {
		return nil, fmt.Errorf("sweep snapshots: %w", err)
	}
	if _, err := w.blobs.Sweep(ctx); err != nil {
		return nil, fmt.Errorf("sweep blobs: %w", err)
	}
	for _, p := range append(w.snapshots.Check(ctx, deep), w.blobs.Check(ctx, deep)...) {
		problems = append(problems, p.Error())
	}
	return problems, nil
}
