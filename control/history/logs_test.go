package history

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/internal/store"
	control "github.com/moby/buildkit/api/services/control"
	"google.golang.org/protobuf/proto"
)

// compat: CTL-061
func TestToldIsKeptWithTheRecord(t *testing.T) {
	root := t.TempDir()
	db := openStore(t, root)
	l := Open(Config{Store: db, MaxAge: time.Hour, MaxEntries: 10})
	told := []*control.StatusResponse{
		{Vertexes: []*control.Vertex{{Digest: "sha256:a", Name: "a step"}}},
		{Logs: []*control.VertexLog{{Vertex: "sha256:a", Msg: []byte("printed\n"), Stream: 1}}},
		{},
	}
	if err := l.Completed(record("r", 0), slices.Values(told)); err != nil {
		t.Fatal(err)
	}
	complete(t, l, record("silent", 0))
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	db = openStore(t, root)
	defer db.Close()
	l = Open(Config{Store: db, MaxAge: time.Hour, MaxEntries: 10})
	got, ok, err := l.Told("r")
	if err != nil || !ok || len(got) != len(told) {
		t.Fatalf("%d messages, %v, %v", len(got), ok, err)
	}
	for i := range told {
		if !proto.Equal(got[i], told[i]) {
			t.Errorf("message %d is %v, want %v", i, got[i], told[i])
		}
	}
	if got, ok, err := l.Told("silent"); err != nil || !ok || len(got) != 0 {
		t.Errorf("a build that told nothing: %v, %v, %v", got, ok, err)
	}
	if _, ok, err := l.Told("nobody"); ok || err != nil {
		t.Errorf("an unknown build: %v, %v", ok, err)
	}
	if err := l.Update(&control.UpdateBuildHistoryRequest{Ref: "r", Pinned: true}); err != nil {
		t.Fatal(err)
	}
	if got, _, _ := l.Told("r"); len(got) != len(told) {
		t.Error("pinning the record lost its log")
	}
	if err := l.Update(&control.UpdateBuildHistoryRequest{Ref: "r", Delete: true}); err != nil {
		t.Fatal(err)
	}
	if _, ok := db.Get(logsBucket, "r"); ok {
		t.Error("the log of a deleted record is left")
	}
}

func TestLongLogsKeepTheirVertices(t *testing.T) {
	l := newLog(t, Config{MaxAge: time.Hour, MaxEntries: 10})
	var told []*control.StatusResponse
	for i := range 12 {
		told = append(told, &control.StatusResponse{
			Vertexes: []*control.Vertex{{Name: fmt.Sprint(i)}},
			Logs:     []*control.VertexLog{{Msg: bytes.Repeat([]byte{byte(i)}, 1<<20)}},
		})
	}
	if err := l.Completed(record("r", 0), slices.Values(told)); err != nil {
		t.Fatal(err)
	}
	got, _, err := l.Told("r")
	if err != nil || len(got) != len(told) {
		t.Fatalf("%d messages: %v", len(got), err)
	}
	for i, msg := range got {
		if len(msg.Vertexes) != 1 || (len(msg.Logs) > 0) != (i < 8) {
			t.Errorf("message %d has %d vertices and %d logs", i, len(msg.Vertexes), len(msg.Logs))
		}
	}
}

func TestDamagedLogIsAnError(t *testing.T) {
	l := newLog(t, Config{MaxAge: time.Hour, MaxEntries: 10})
	enc, _ := codec()
	for name, value := range map[string][]byte{
		"no zstd":  []byte("garbage"),
		"cut":      enc.EncodeAll([]byte("\x09\x00\x00\x00abc"), nil),
		"short":    enc.EncodeAll([]byte("\x09\x00"), nil),
		"no proto": enc.EncodeAll([]byte("\x03\x00\x00\x00\xff\xff\xff"), nil),
	} {
		complete(t, l, record(name, 0))
		var b store.Batch
		b.Put(logsBucket, name, value)
		l.cfg.Store.Write(&b)
		if _, _, err := l.Told(name); err == nil || !strings.Contains(err.Error(), "log of build "+name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
