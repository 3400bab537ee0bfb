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
	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/ops"
)

// Report is what Check found; nothing is wrong if Problems is empty.
type Report struct {
	Cache     cache.Report
	Keys      keys.Counts
	Leftovers int // files of interrupted work, which the next start removes
	Problems  []string
}

// String counts what was looked at.
func (r Report) String() string {
	return fmt.Sprintf("%d records, %d snapshots, %d blobs, %d bytes; %d links between keys, %d results; %d files of interrupted work; %d problems",
		r.Cache.Records, r.Cache.Snapshots, r.Cache.Blobs, r.Cache.Bytes, r.Keys.Links, r.Keys.Results, r.Leftovers, len(r.Problems))
}

// Check verifies the state under root, of a worker that isn't running, and
// changes nothing: every page of the database and the journal, every record with
// its parents, snapshots and blobs, and every key. deep also reads all blobs and
// measures all snapshots. The error is about checking, not about what is found.
func Check(ctx context.Context, root string, deep bool) (_ Report, err error) {
	w, err := stateAt(root)
	if err != nil {
		return Report{}, err
	}
	w.readOnly = true
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	r := Report{}
	// What the cache drops when it opens is wrong, too.
	w.cfg.Log = slog.New(teller(func(msg string, args ...any) { r.Problems = append(r.Problems, line(msg, args)) }))
	err = w.openFiles(&undo, func(string, ...any) {})
	if store.IsDamaged(err) {
		r.Problems = append(r.Problems, fmt.Sprintf("%v; the next start, or --repair, rebuilds the database from its journal", err))
		return r, nil
	}
	if err != nil {
		return r, err
	}
	if w.store.Unproven() {
		r.Problems = append(r.Problems, "the database was rebuilt and not compared with the files; the next start, or --repair, does that")
	}
	if err := w.store.Check(); err != nil {
		r.Problems = append(r.Problems, err.Error())
	}
	// Before the cache opens: it drops records of files that are gone.
	for _, p := range append(w.snapshots.Check(ctx, deep), w.blobs.Check(ctx, deep)...) {
		r.Problems = append(r.Problems, p.Error())
	}
	if r.Leftovers, err = w.sweep(ctx); err != nil {
		return r, err
	}
	if err := w.openCache(ctx, &undo, nil); err != nil {
		return r, err
	}
	found, err := w.cache.Check(ctx, deep)
	if err != nil {
		return r, err
	}
	counts, dangling := keys.Open(w.store).Check(ops.Results{Cache: w.cache}.Exists)
	r.Cache, r.Keys = *found, counts
	r.Problems = append(append(r.Problems, found.Problems...), dangling...)
	return r, context.Cause(ctx)
}

// Repair does for the state under root, of a worker that isn't running, what a
// start does, and more: the journal is looked at as a whole, the key graph is
// compared with the records, and if deep, blobs whose content is wrong are
// dropped and snapshots measured. It returns what was repaired, as far as there is something to tell;
// what is cached in damaged files is lost, anything else stays.
func Repair(ctx context.Context, root string, deep bool) (done []string, err error) {
	w, err := stateAt(root)
	if err != nil {
		return nil, err
	}
	tell := func(msg string, args ...any) {
		done = append(done, line(msg, args))
	}
	w.cfg.Log = slog.New(teller(tell))
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	if err := w.openFiles(&undo, tell); err != nil {
		return done, err
	}
	if rewritten, err := w.store.RepairJournal(); err != nil {
		return done, err
	} else if rewritten {
		tell("the journal was damaged and is written anew")
	}
	w.snapshots.ForgetLost()
	if deep {
		if err := w.dropDamagedBlobs(ctx, tell); err != nil {
			return done, err
		}
	}
	if err := w.openCache(ctx, &undo, nil); err != nil {
		return done, err
	}
	if deep {
		n, err := w.cache.Remeasure(ctx)
		if err != nil {
			return done, err
		}
		if n > 0 {
			tell("sizes of snapshots were wrong and are corrected", "snapshots", n)
		}
	}
	w.openKeys(true)
	if n := w.cache.DropStrayMetadata(); n > 0 {
		tell("metadata belonged to no record and is removed", "entries", n)
	}
	return done, w.store.SyncSince(ctx, 0) // all of it, or else it isn't repaired
}

// stateAt is a worker that can open the state under root, which must be there.
func stateAt(root string) (*Worker, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	for _, name := range []string{"kiln.db", "kiln.journal"} {
		if _, err := os.Stat(filepath.Join(root, name)); err == nil {
			return &Worker{cfg: Config{Root: root, Log: slog.New(slog.DiscardHandler)}}, nil
		}
	}
	return nil, fmt.Errorf("%s holds no state of kilnd: there is neither kiln.db nor kiln.journal", root)
}

func (w *Worker) sweep(ctx context.Context) (int, error) {
	snapshots, err := w.snapshots.Sweep(ctx)
	if err != nil {
		return 0, fmt.Errorf("sweep snapshots: %w", err)
	}
	blobs, err := w.blobs.Sweep(ctx)
	if err != nil {
		return 0, fmt.Errorf("sweep blobs: %w", err)
	}
	return snapshots + blobs, nil
}

func (w *Worker) dropDamagedBlobs(ctx context.Context, tell func(msg string, args ...any)) error {
	damaged, err := w.blobs.Damaged(ctx)
	if err != nil {
		return err
	}
	b := &store.Batch{}
	for _, d := range damaged {
		if err := w.blobs.Remove(b, d); err != nil {
			return err
		}
		tell("blob", d, "has the wrong content and is removed")
	}
	w.store.Write(b)
	return nil
}

// openKeys opens the key graph, and sees to it that what the cache dropped is
// dropped there too, and with a database that was rebuilt in part everything that
// leads nowhere: one that is whole is consistent, as every commit leaves it.
func (w *Worker) openKeys(thorough bool) {
	w.keys = keys.Open(w.store)
	w.cache.OnRemove(w.keys.Forget)
	if !thorough && !w.store.Unproven() {
		return
	}
	if thorough || w.store.Partial() {
		if n := w.keys.Repair(ops.Results{Cache: w.cache}.Exists); n > 0 {
			w.cfg.Log.Warn("entries of the key graph led nowhere and are removed", "entries", n)
		}
	}
	b := &store.Batch{}
	b.Proven()
	w.store.Write(b)
}

// line is a message and its details in one line.
func line(msg string, args []any) string {
	return strings.TrimSpace(fmt.Sprintln(append([]any{msg}, args...)...))
}

// teller is a slog.Handler that passes warnings and errors on.
type teller func(msg string, args ...any)

func (t teller) Enabled(_ context.Context, l slog.Level) bool { return l >= slog.LevelWarn }

func (t teller) Handle(_ context.Context, r slog.Record) error {
	var args []any
	r.Attrs(func(a slog.Attr) bool {
		args = append(args, a.Key, a.Value)
		return true
	})
	t(r.Message, args...)
	return nil
}

func (t teller) WithAttrs([]slog.Attr) slog.Handler { return t }
func (t teller) WithGroup(string) slog.Handler      { return t }
