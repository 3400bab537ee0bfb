package control

import (
	"errors"
	"io/fs"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/client"
	control "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
)

// A report tells of every record that du lists, and its parts are all there is
// on disk.
func TestUsageReport(t *testing.T) {
	d := newDaemon(t, time.Hour)
	for _, name := range []string{"/a", "/b"} {
		_, err := d.control().Solve(t.Context(), &control.SolveRequest{Ref: "build" + strings.Trim(name, "/"), Definition: definition(t, mkfile(name, "content"))})
		must(t, err)
	}
	du, err := d.control().DiskUsage(t.Context(), &control.DiskUsageRequest{})
	must(t, err)
	if len(du.Record) != 2 {
		t.Fatalf("du lists %v", du.Record)
	}
	d.explain.Forget("")                        // what is to be kept of the builds is written
	must(t, d.worker.Store().Sync(t.Context())) // and the last commit is over
	report, err := d.client().UsageReport(t.Context())
	must(t, err)
	listed, parts := int64(0), int64(0)
	for _, r := range du.Record {
		listed += r.Size
		detail := report.Records[r.ID]
		if !slices.Equal(detail.Users, []string{"kept as a step's result"}) || detail.Rule != "gc rule#1" || detail.Due {
			t.Errorf("%s: %+v", r.ID, detail)
		}
	}
	for _, p := range report.Space {
		parts += p.Bytes
		if p.Name == "Records" && p.Bytes != listed || p.Bytes < 0 {
			t.Errorf("%+v, du lists %d bytes", p, listed)
		}
	}
	if on := allocated(t, filepath.Join(filepath.Dir(strings.TrimPrefix(d.addr, "unix://")), "state")); parts < on*99/100 || parts > on*101/100 {
		t.Errorf("the parts have %d bytes, there are %d on disk: %+v", parts, on, report.Space)
	}
	report, err = d.client().UsageReport(t.Context(), "id=="+du.Record[0].ID)
	must(t, err)
	if len(report.Records) != 1 {
		t.Errorf("filtered: %+v", report.Records)
	}
	_, err = d.client().UsageReport(t.Context(), "==")
	if err == nil || !strings.Contains(err.Error(), "filter") {
		t.Errorf("a bad filter: %v", err)
	}
}

func allocated(t *testing.T, root string) (total int64) {
	t.Helper()
	must(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st syscall.Stat_t
		err = syscall.Lstat(path, &st)
		total += st.Blocks * 512
		return err
	}))
	return total
}

// A daemon that has no such service is no failure of the client.
func TestNoUsageReport(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	must(t, err)
	g := grpc.NewServer()
	served := make(chan error, 1)
	go func() { served <- g.Serve(l) }()
	c, err := client.New("unix://"+path, client.Options{})
	must(t, err)
	if _, err := c.UsageReport(t.Context()); !errors.Is(err, client.ErrNoReport) {
		t.Errorf("error %v", err)
	}
	must(t, c.Close())
	g.Stop()
	must(t, <-served)
}

// compat: CTL-121
func TestWorkersShowTheirRules(t *testing.T) {
	d := newDaemon(t, time.Hour)
	resp, err := d.control().ListWorkers(t.Context(), &control.ListWorkersRequest{})
	must(t, err)
	got := resp.Record[0].GCPolicy
	if len(got) != 4 || got[0].MaxUsedSpace != 512e6 || time.Duration(got[0].KeepDuration) != 48*time.Hour || len(got[0].Filters) != 3 || got[0].All ||
		got[1].ReservedSpace == 0 || got[1].MinFreeSpace == 0 || !got[3].All {
		t.Errorf("rules %+v", got)
	}
	if rec := WorkerRecord(noRules{d.worker}); len(rec.GCPolicy) != 0 { // compat: DMN-096
		t.Errorf("without garbage collection: %+v", rec.GCPolicy)
	}
}

// Each record that prune removes is told of, and remembered with the rule.
func TestPruneIsRemembered(t *testing.T) {
	d := newDaemon(t, time.Hour)
	_, err := d.control().Solve(t.Context(), &control.SolveRequest{Ref: "b", Definition: definition(t, mkfile("/f", "content"))})
	must(t, err)
	stream, err := d.control().Prune(t.Context(), &control.PruneRequest{Filter: []string{"type==regular"}})
	must(t, err)
	rec, err := stream.Recv()
	must(t, err)
	if _, err := stream.Recv(); err == nil {
		t.Error("more records went")
	}
	ev, ok := d.worker.Cache().Evicted(rec.ID)[rec.ID]
	if !ok || ev.Rule != "prune" || ev.Description != rec.Description || ev.Size != rec.Size || len(ev.Keys) == 0 {
		t.Errorf("%+v of %+v", ev, rec)
	}
	if byKey := d.worker.Cache().Evicted(ev.Keys...); byKey[ev.Keys[0]].Record != rec.ID {
		t.Errorf("by key: %+v", byKey)
	}
	_, err = d.control().DiskUsage(t.Context(), &control.DiskUsageRequest{Filter: []string{"a b"}})
	wantCode(t, err, codes.InvalidArgument, "filter")
}

// noRules is a worker without garbage collection.
type noRules struct{ Worker }

func (noRules) GCRules() []cache.PruneOptions { return nil }
