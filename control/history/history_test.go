package history

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/internal/store"
	control "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func openStore(t *testing.T, root string) *store.DB {
	t.Helper()
	db, err := store.Open(store.Options{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	return db
}

func newLog(t *testing.T, cfg Config) *Log {
	t.Helper()
	cfg.Store = openStore(t, t.TempDir())
	t.Cleanup(func() { cfg.Store.Close() })
	return Open(cfg)
}

// record is one of a build that began and ended so long ago.
func record(ref string, age time.Duration) *control.BuildHistoryRecord {
	when := timestamppb.New(time.Now().Add(-age))
	return &control.BuildHistoryRecord{Ref: ref, CreatedAt: when, CompletedAt: when}
}

func complete(t *testing.T, l *Log, recs ...*control.BuildHistoryRecord) {
	t.Helper()
	for _, r := range recs {
		if err := l.Completed(r, slices.Values([]*control.StatusResponse(nil))); err != nil {
			t.Fatal(err)
		}
	}
}

// listed is what a listener that doesn't wait gets: the type's first letter and
// the ref of each event.
func listed(t *testing.T, l *Log, req *control.BuildHistoryRequest) string {
	t.Helper()
	req.EarlyExit = true
	var out []string
	if err := l.Listen(t.Context(), req, func(ev *control.BuildHistoryEvent) error {
		out = append(out, show(ev))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return strings.Join(out, " ")
}

func show(ev *control.BuildHistoryEvent) string {
	return ev.Type.String()[:1] + ":" + ev.Record.Ref
}

// compat: CTL-138
func TestList(t *testing.T) {
	l := newLog(t, Config{MaxAge: time.Hour, MaxEntries: 10})
	complete(t, l, record("old", 3*time.Minute), record("new", time.Minute), record("mid", 2*time.Minute))
	l.Started(record("running", 0))
	for _, c := range []struct {
		req  *control.BuildHistoryRequest
		want string
	}{
		{&control.BuildHistoryRequest{}, "S:running C:new C:mid C:old"},
		{&control.BuildHistoryRequest{Limit: 2}, "S:running C:new C:mid"},
		{&control.BuildHistoryRequest{ActiveOnly: true}, "S:running"},
		{&control.BuildHistoryRequest{Ref: "mid"}, "C:mid"},
		{&control.BuildHistoryRequest{Ref: "nope"}, ""},
	} {
		if got := listed(t, l, c.req); got != c.want {
			t.Errorf("%v: %s, want %s", c.req, got, c.want)
		}
	}
	err := l.Listen(t.Context(), &control.BuildHistoryRequest{Limit: -1}, nil)
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("negative limit: %v", err)
	}
	err = l.Listen(t.Context(), &control.BuildHistoryRequest{Filter: []string{"status==error"}}, nil)
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("filter: %v", err)
	}
}

// compat: CTL-139, CTL-140
func TestUpdates(t *testing.T) {
	l := newLog(t, Config{MaxAge: time.Hour, MaxEntries: 10})
	complete(t, l, record("r", 0))
	ready := make(chan struct{}, 1)
	got := make(chan *control.BuildHistoryEvent, 10)
	done := make(chan error, 1)
	go func() {
		done <- l.Listen(t.Context(), &control.BuildHistoryRequest{}, func(ev *control.BuildHistoryEvent) error {
			got <- ev
			select {
			case ready <- struct{}{}:
			default:
			}
			return nil
		})
	}()
	<-ready // the stored one: from now on every event is heard
	if ev := <-got; show(ev) != "C:r" {
		t.Fatalf("first event %v", ev)
	}
	for _, req := range []*control.UpdateBuildHistoryRequest{{Ref: "r", Pinned: true}, {Ref: "r"}, {Ref: "r", Finalize: true}, {Ref: "r", Delete: true}} {
		if err := l.Update(req); err != nil {
			t.Fatal(err)
		}
	}
	l.Started(record("s", 0))
	for i, want := range []string{"C:r true 1", "C:r false 2", "D:r false 0", "S:s false 0"} {
		ev := <-got
		if s := fmt.Sprintf("%s %v %d", show(ev), ev.Record.Pinned, ev.Record.Generation); s != want {
			t.Errorf("event %d: %s, want %s", i, s, want)
		}
	}
	for _, req := range []*control.UpdateBuildHistoryRequest{{Ref: "r", Delete: true}, {Ref: "r", Pinned: true}, {Ref: "r", Finalize: true}} {
		if err := l.Update(req); status.Code(err) != codes.NotFound || !strings.Contains(err.Error(), `"r"`) {
			t.Errorf("%v: %v", req, err)
		}
	}
	l.Close()
	if err := <-done; err != nil {
		t.Errorf("Listen ended with %v", err)
	}
}

// What happened before the end of the daemon is still told. compat: CTL-143
func TestNewsBeforeClose(t *testing.T) {
	l := newLog(t, Config{MaxAge: time.Hour, MaxEntries: 10})
	l.Started(record("r", 0))
	var heard []string
	err := l.Listen(t.Context(), &control.BuildHistoryRequest{}, func(ev *control.BuildHistoryEvent) error {
		heard = append(heard, show(ev))
		if len(heard) == 1 { // while it is busy, the build ends and so does the daemon
			complete(t, l, record("r", 0))
			l.Close()
		}
		return nil
	})
	if err != nil || strings.Join(heard, " ") != "S:r C:r" {
		t.Errorf("heard %q, %v", heard, err)
	}
}

func TestListenEnds(t *testing.T) {
	l := newLog(t, Config{MaxAge: time.Hour, MaxEntries: 10})
	cause := errors.New("client gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	if err := l.Listen(ctx, &control.BuildHistoryRequest{}, nil); err != cause {
		t.Errorf("error %v", err)
	}
	complete(t, l, record("r", 0))
	refuse := errors.New("no more")
	if err := l.Listen(t.Context(), &control.BuildHistoryRequest{}, func(*control.BuildHistoryEvent) error { return refuse }); err != refuse {
		t.Errorf("error %v", err)
	}
	if len(l.listeners) > 0 {
		t.Errorf("%d listeners are left", len(l.listeners))
	}
}

// compat: CTL-141
func TestRetention(t *testing.T) {
	l := newLog(t, Config{MaxAge: time.Hour, MaxEntries: 2})
	pinned := record("pinned", 30*time.Hour)
	pinned.Pinned = true
	complete(t, l, pinned, record("a", 5*time.Hour), record("b", 4*time.Hour))
	if got := listed(t, l, &control.BuildHistoryRequest{}); got != "C:b C:a C:pinned" {
		t.Errorf("within the bound: %s", got)
	}
	complete(t, l, record("c", 30*time.Minute))
	if got := listed(t, l, &control.BuildHistoryRequest{}); got != "C:c C:b C:pinned" {
		t.Errorf("the oldest is beyond both bounds: %s", got)
	}
	complete(t, l, record("d", time.Minute), record("e", 0))
	if got := listed(t, l, &control.BuildHistoryRequest{}); got != "C:e C:d C:c C:pinned" {
		t.Errorf("young ones stay: %s", got)
	}
}

func TestReopen(t *testing.T) {
	root := t.TempDir()
	db := openStore(t, root)
	l := Open(Config{Store: db, MaxAge: time.Hour, MaxEntries: 1})
	complete(t, l, record("new", time.Minute))
	if err := l.Update(&control.UpdateBuildHistoryRequest{Ref: "new", Pinned: true}); err != nil {
		t.Fatal(err)
	}
	complete(t, l, record("old", 2*time.Minute), record("gone", 3*time.Minute))
	if err := l.Update(&control.UpdateBuildHistoryRequest{Ref: "gone", Delete: true}); err != nil {
		t.Fatal(err)
	}
	var b store.Batch
	b.Put(bucket, "garbage", []byte{0xff})
	b.Put(bucket, "liar", []byte("\x0a\x05other"))
	db.Write(&b)
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}

	db = openStore(t, root)
	defer db.Close()
	l = Open(Config{Store: db, MaxAge: time.Second, MaxEntries: 0})
	if got := listed(t, l, &control.BuildHistoryRequest{}); got != "C:new" {
		t.Errorf("after reopening with tighter bounds: %s", got)
	}
	if !l.ended["new"].Pinned || l.ended["new"].Generation != 1 {
		t.Errorf("record %v", l.ended["new"])
	}
	if _, ok := db.Get(bucket, "garbage"); ok {
		t.Error("what can't be read is kept")
	}
}
