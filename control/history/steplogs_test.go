package history

import (
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/internal/steplog"
	control "github.com/moby/buildkit/api/services/control"
)

// storedLog is a log of n bytes and an error.
func storedLog(t *testing.T, n int) *steplog.Log {
	t.Helper()
	w := steplog.NewWriter(t.TempDir(), func() {})
	for left := n; left > 0; left -= 32 << 10 {
		fmt.Fprint(w.Stream(1), strings.Repeat("x", min(left, 32<<10)))
	}
	fmt.Fprint(w.Stream(2), "failed\n")
	log := new(steplog.Log)
	if err := errors.Join(log.Grow(w.Extent()), w.Close()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { log.Close() }) // it was read only
	return log
}

// replayed is what Replay sends of r, message by message.
func replayed(t *testing.T, l *Log) (printed [3]string, messages []*control.StatusResponse) {
	t.Helper()
	told, ok, err := l.Told("r")
	if err != nil || !ok {
		t.Fatalf("told: %v, %v", ok, err)
	}
	err = l.Replay("r", told, func(msg *control.StatusResponse) error {
		messages = append(messages, msg)
		for _, entry := range msg.Logs {
			printed[entry.Stream] += string(entry.Msg)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return printed, messages
}

// The whole log of a step is kept with the record, across a restart, and goes with
// it. It is replayed where the step printed, in messages of a bounded size.
// compat: CTL-061
func TestWholeLogIsReplayed(t *testing.T) {
	root := t.TempDir()
	db := openStore(t, root)
	defer db.Close()
	cfg := Config{Store: db, MaxAge: time.Hour, MaxEntries: 10, Logs: filepath.Join(root, "logs")}
	l := Open(cfg)
	const size = 5<<20 + 1
	for range 2 { // the second one in place of the first
		if err := l.KeepLogs("r", map[string]*steplog.Log{"sha256:a": storedLog(t, size)}); err != nil {
			t.Fatal(err)
		}
	}
	told := []*control.StatusResponse{
		{Vertexes: []*control.Vertex{{Digest: "sha256:a"}}},
		{Logs: []*control.VertexLog{{Vertex: "sha256:b", Msg: []byte("short\n"), Stream: 1}, {Vertex: "sha256:a", Stream: 1}}},
		{Vertexes: []*control.Vertex{{Digest: "sha256:a", Name: "ended"}}},
	}
	if err := l.Completed(record("r", 0), slices.Values(told)); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(cfg.Logs, "of-nobody"), 0o700); err != nil {
		t.Fatal(err)
	}
	l = Open(cfg)
	if _, err := os.Stat(filepath.Join(cfg.Logs, "of-nobody")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("logs without a record are left: %v", err)
	}
	printed, messages := replayed(t, l)
	if want := "short\n" + strings.Repeat("x", size); printed[1] != want || printed[2] != "failed\n" {
		t.Errorf("%d bytes of stdout, want %d; stderr %q", len(printed[1]), len(want), printed[2])
	}
	for i, msg := range messages {
		n := 0
		for _, entry := range msg.Logs {
			n += len(entry.Msg)
		}
		if n > 2*replayPart {
			t.Errorf("message %d has %d bytes", i, n)
		}
	}
	if last := messages[len(messages)-1]; len(last.Vertexes) != 1 || last.Vertexes[0].Name != "ended" {
		t.Errorf("the last message is %v", last)
	}
	if err := l.Update(&control.UpdateBuildHistoryRequest{Ref: "r", Delete: true}); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(cfg.Logs); err != nil || len(left) > 0 {
		t.Errorf("after the record: %v, %v", left, err)
	}
}

func TestMissingLogIsTold(t *testing.T) {
	l := newLog(t, Config{MaxAge: time.Hour, MaxEntries: 10, Logs: t.TempDir()})
	if err := l.Completed(record("r", 0), one(&control.StatusResponse{Logs: []*control.VertexLog{{Vertex: "sha256:a", Stream: 1}}})); err != nil {
		t.Fatal(err)
	}
	if printed, _ := replayed(t, l); !strings.Contains(printed[2], "[output is missing here: ") {
		t.Errorf("replayed %q", printed)
	}
}

// The logs of the oldest builds go when all take more than they may, but for those of
// the newest and of pinned records, also of an earlier life; the records stay, and say
// what is missing.
func TestLogsAreLimited(t *testing.T) {
	root := t.TempDir()
	db := openStore(t, root)
	defer db.Close()
	cfg := Config{Store: db, MaxAge: time.Hour, MaxEntries: 10, Logs: filepath.Join(root, "logs"), MaxLogs: 1 << 20}
	const size = 400 << 10
	l := Open(cfg)
	for i, ref := range []string{"pinned", "r", "s", "t"} {
		if ref == "t" {
			l = Open(cfg)
		}
		if err := l.KeepLogs(ref, map[string]*steplog.Log{"sha256:a": storedLog(t, size)}); err != nil {
			t.Fatal(err)
		}
		told := &control.StatusResponse{Logs: []*control.VertexLog{{Vertex: "sha256:a", Stream: 1}}}
		if err := l.Completed(record(ref, time.Duration(4-i)*time.Second), one(told)); err != nil {
			t.Fatal(err)
		}
		if ref == "pinned" {
			if err := l.Update(&control.UpdateBuildHistoryRequest{Ref: ref, Pinned: true}); err != nil {
				t.Fatal(err)
			}
		}
	}
	for ref, want := range map[string]bool{"pinned": true, "r": false, "s": false, "t": true} {
		if _, err := os.Stat(l.logsOf(ref)); (err == nil) != want {
			t.Errorf("logs of %s: %v", ref, err)
		}
	}
	if printed, _ := replayed(t, l); !strings.Contains(printed[2], "output is missing") || !strings.Contains(printed[2], "may take 1MiB (kiln.maxLogStorage)") {
		t.Errorf("replayed %q", printed)
	}
	cfg.MaxLogs = 1
	l = Open(cfg)
	if err := l.KeepLogs("u", map[string]*steplog.Log{"sha256:a": storedLog(t, size)}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(l.logsOf("u")); err != nil {
		t.Errorf("those of the newest build are gone: %v", err)
	}
	if _, err := os.Stat(l.logsOf("t")); err == nil {
		t.Error("those of the one before are left")
	}
}

func one(msg *control.StatusResponse) iter.Seq[*control.StatusResponse] {
	return slices.Values([]*control.StatusResponse{msg})
}
