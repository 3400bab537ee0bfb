// Package history keeps a record of every build that ended, and tells
// listeners of builds as they begin, end and are forgotten.
package history

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/internal/store"
	control "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// bucket holds the records, protobufs by ref.
const bucket = "history"

// Config says where records live and how many are kept: a record goes when it
// is both beyond MaxEntries and older than MaxAge, unless it is pinned
// (CTL-141).
type Config struct {
	Store      *store.DB
	MaxAge     time.Duration
	MaxEntries int
	Log        *slog.Logger // nil discards
	// Logs is a directory for the logs of steps that printed much, the history's
	// alone; "" has them kept nowhere.
	Logs string
	// MaxLogs is how many bytes Logs may take, but for those of the newest build and
	// of pinned records; 0 is any number.
	MaxLogs int64
	// Forgotten is told of builds whose records are deleted; may be nil. It must
	// not call back.
	Forgotten func(ref string)
}

// Log is the history. All methods are safe for concurrent use.
type Log struct {
	cfg Config

	// mu guards the fields below and is never held across a send. A listener's
	// lock comes after it.
	mu        sync.Mutex
	active    map[string]*control.BuildHistoryRecord
	ended     map[string]*control.BuildHistoryRecord
	listeners map[*listener]struct{}
	logSizes  map[string]int64 // of directories below Logs, by ref
	closed    chan struct{}    // needs no lock
}

type listener struct {
	mu     sync.Mutex // guards events
	events []*control.BuildHistoryEvent
	wake   chan struct{} // of capacity 1
}

// Open loads the records and forgets those that are too old. One that can't be
// read is dropped with a word in the log: it must not keep the daemon down.
func Open(cfg Config) *Log {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	l := &Log{
		cfg:       cfg,
		active:    map[string]*control.BuildHistoryRecord{},
		ended:     map[string]*control.BuildHistoryRecord{},
		listeners: map[*listener]struct{}{},
		logSizes:  map[string]int64{},
		closed:    make(chan struct{}),
	}
	var bad store.Batch
	cfg.Store.Scan(bucket, "", func(ref string, value []byte) bool {
		rec := &control.BuildHistoryRecord{}
		if err := proto.Unmarshal(value, rec); err != nil || rec.Ref != ref {
			cfg.Log.Warn("a history record can't be read and is dropped", "build", ref, "err", err)
			bad.Delete(bucket, ref)
			bad.Delete(logsBucket, ref)
			return true
		}
		l.ended[ref] = rec
		return true
	})
	cfg.Store.Write(&bad)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.trimLocked(time.Now())
	if err := l.sweepLogs(); err != nil {
		cfg.Log.Warn("logs of steps that no record has are left", "err", err)
	}
	return l
}

// Close ends what listeners wait for: no more news will come. It is called
// once, after the last build has ended.
func (l *Log) Close() { close(l.closed) }

// Started announces a build. The record must not be changed afterwards.
func (l *Log) Started(rec *control.BuildHistoryRecord) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.active[rec.Ref] = rec
	l.tellLocked(control.BuildHistoryEventType_STARTED, rec)
}

// Completed stores the record of an ended build, with what the build told, and
// forgets what is too old. The record must not be changed afterwards.
func (l *Log) Completed(rec *control.BuildHistoryRecord, told iter.Seq[*control.StatusResponse]) error {
	var b store.Batch
	err := putLog(&b, rec.Ref, told)
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.active, rec.Ref)
	if err := errors.Join(err, l.putLocked(&b, rec)); err != nil {
		return err
	}
	l.trimLocked(time.Now())
	return nil
}

// putLocked stores the record with what is in the batch already.
func (l *Log) putLocked(b *store.Batch, rec *control.BuildHistoryRecord) error {
	value, err := proto.Marshal(rec)
	if err != nil {
		return fmt.Errorf("encode history record of build %s: %w", rec.Ref, err)
	}
	b.Put(bucket, rec.Ref, value)
	l.cfg.Store.Write(b)
	l.ended[rec.Ref] = rec
	l.tellLocked(control.BuildHistoryEventType_COMPLETE, rec)
	return nil
}

func (l *Log) trimLocked(now time.Time) {
	kept := 0 // pinned ones don't count
	for _, rec := range l.newestLocked() {
		switch {
		case rec.Pinned:
		case kept >= l.cfg.MaxEntries && now.Sub(rec.CompletedAt.AsTime()) > l.cfg.MaxAge:
			l.deleteLocked(rec.Ref)
		default:
			kept++
		}
	}
}

func (l *Log) deleteLocked(ref string) {
	var b store.Batch
	b.Delete(bucket, ref)
	b.Delete(logsBucket, ref)
	l.cfg.Store.Write(&b)
	delete(l.ended, ref)
	if err := l.dropLogsLocked(ref); err != nil {
		l.cfg.Log.Warn("remove the logs of a build's steps", "build", ref, "err", err)
	}
	if l.cfg.Forgotten != nil {
		l.cfg.Forgotten(ref)
	}
	l.tellLocked(control.BuildHistoryEventType_DELETED, &control.BuildHistoryRecord{Ref: ref})
}

func (l *Log) newestLocked() []*control.BuildHistoryRecord { return newest(l.ended) }

// newest sorts records, those of the same time by their refs.
func newest(records map[string]*control.BuildHistoryRecord) []*control.BuildHistoryRecord {
	return slices.SortedFunc(maps.Values(records), func(a, b *control.BuildHistoryRecord) int {
		return cmp.Or(b.CreatedAt.AsTime().Compare(a.CreatedAt.AsTime()), cmp.Compare(a.Ref, b.Ref))
	})
}

// Update pins, unpins or deletes a record (CTL-140).
func (l *Log) Update(req *control.UpdateBuildHistoryRequest) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	rec, ok := l.ended[req.Ref]
	switch {
	case !ok:
		return status.Errorf(codes.NotFound, "the history has no record of a build %q that ended", req.Ref)
	case req.Delete:
		l.deleteLocked(req.Ref)
		return nil
	case req.Finalize:
		return nil // everything is stored when a build ends
	}
	next := proto.CloneOf(rec)
	next.Pinned = req.Pinned
	next.Generation++
	return l.putLocked(&store.Batch{}, next)
}

func (l *Log) tellLocked(typ control.BuildHistoryEventType, rec *control.BuildHistoryRecord) {
	ev := &control.BuildHistoryEvent{Type: typ, Record: rec}
	for li := range l.listeners {
		li.mu.Lock()
		li.events = append(li.events, ev)
		li.mu.Unlock()
		select {
		case li.wake <- struct{}{}:
		default:
		}
	}
}

// Listen sends the builds that run, then the stored records, newest first, then
// events as they happen, until ctx ends or, with EarlyExit, at once (CTL-136).
func (l *Log) Listen(ctx context.Context, req *control.BuildHistoryRequest, send func(*control.BuildHistoryEvent) error) error {
	switch {
	case req.Limit < 0:
		return status.Errorf(codes.InvalidArgument, "Limit is negative: %d", req.Limit)
	case len(req.Filter) > 0:
		return status.Error(codes.Unimplemented, "Filter: this daemon does not filter its history; ask without a filter")
	}
	li := &listener{wake: make(chan struct{}, 1)}
	past := l.subscribe(li, req)
	defer l.unsubscribe(li)
	for _, ev := range past {
		if err := send(ev); err != nil {
			return err
		}
	}
	if req.EarlyExit {
		return nil
	}
	for open := true; open; {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-l.closed:
			open = false // after the news that came before
		case <-li.wake:
		}
		for _, ev := range li.take() {
			if !wanted(req, ev) {
				continue
			}
			if err := send(ev); err != nil {
				return err
			}
		}
	}
	return nil
}

// take returns the events since the last call.
func (li *listener) take() []*control.BuildHistoryEvent {
	li.mu.Lock()
	defer li.mu.Unlock()
	events := li.events
	li.events = nil
	return events
}

func wanted(req *control.BuildHistoryRequest, ev *control.BuildHistoryEvent) bool {
	return req.Ref == "" || req.Ref == ev.Record.Ref
}

func (l *Log) subscribe(li *listener, req *control.BuildHistoryRequest) []*control.BuildHistoryEvent {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.listeners[li] = struct{}{}
	var past []*control.BuildHistoryEvent
	add := func(typ control.BuildHistoryEventType, rec *control.BuildHistoryRecord) {
		if ev := (&control.BuildHistoryEvent{Type: typ, Record: rec}); wanted(req, ev) {
			past = append(past, ev)
		}
	}
	for _, rec := range newest(l.active) {
		add(control.BuildHistoryEventType_STARTED, rec)
	}
	if req.ActiveOnly {
		return past
	}
	running := len(past)
	for _, rec := range l.newestLocked() {
		add(control.BuildHistoryEventType_COMPLETE, rec)
	}
	if limit := int(req.Limit); limit > 0 && len(past) > running+limit {
		past = past[:running+limit]
	}
	return past
}

func (l *Log) unsubscribe(li *listener) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.listeners, li)
}
