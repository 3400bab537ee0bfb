package control

import (
	"context"
	"strings"

	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/internal/version"
	control "github.com/moby/buildkit/api/services/control"
	apitypes "github.com/moby/buildkit/api/types"
	"github.com/moby/buildkit/solver/pb"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// ListWorkers describes the workers, the default one first (CTL-120 to -123).
func (s *Server) ListWorkers(_ context.Context, req *control.ListWorkersRequest) (*control.ListWorkersResponse, error) {
	filter, err := filters.ParseAll(req.Filter...)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "filter: %v", err)
	}
	resp := &control.ListWorkersResponse{}
	for _, w := range s.front.Workers() {
		if filter.Match(workerFields(w)) {
			resp.Record = append(resp.Record, w)
		}
	}
	return resp, nil
}

// workerFields lets filters look at a worker's id and labels.
func workerFields(w *apitypes.WorkerRecord) filters.Adaptor {
	return filters.AdapterFunc(func(path []string) (string, bool) {
		switch {
		case len(path) == 1 && path[0] == "id":
			return w.ID, w.ID != ""
		case len(path) > 1 && path[0] == "labels":
			v, ok := w.Labels[strings.Join(path[1:], ".")]
			return v, ok
		}
		return "", false
	})
}

// buildkitVersion is what clients are told of this daemon (CTL-122).
func buildkitVersion() *apitypes.BuildkitVersion {
	return &apitypes.BuildkitVersion{
		Package: version.Package, Version: version.Protocol(), Revision: version.Revision,
		DockerfileVersion: version.Dockerfile,
	}
}

// Info tells the daemon's version.
func (s *Server) Info(context.Context, *control.InfoRequest) (*control.InfoResponse, error) {
	return &control.InfoResponse{BuildkitVersion: buildkitVersion()}, nil
}

// Worker is what a record tells of a worker.
type Worker interface {
	ID() string
	Labels() map[string]string
	Platforms() []ocispec.Platform
	GCRules() []cache.PruneOptions
}

// WorkerRecord describes w as clients list it (CTL-121).
func WorkerRecord(w Worker) *apitypes.WorkerRecord {
	rec := &apitypes.WorkerRecord{ID: w.ID(), Labels: w.Labels(), BuildkitVersion: buildkitVersion()}
	for _, p := range w.Platforms() {
		rec.Platforms = append(rec.Platforms, pb.PlatformFromSpec(p))
	}
	for _, r := range w.GCRules() {
		rec.GCPolicy = append(rec.GCPolicy, &apitypes.GCPolicy{
			All: r.All, Filters: r.Filters, KeepDuration: int64(r.KeepDuration),
			ReservedSpace: r.ReservedSpace, MaxUsedSpace: r.MaxUsedSpace, MinFreeSpace: r.MinFreeSpace,
		})
	}
	return rec
}
