package control

import (
	"context"
	"time"

	"github.com/containerd/containerd/v2/pkg/filters"
	"github.com/kilnbuild/kiln/cache"
	control "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// DiskUsage lists cache records (CTL-100 to -106).
func (s *Server) DiskUsage(ctx context.Context, req *control.DiskUsageRequest) (*control.DiskUsageResponse, error) {
	if req.AgeLimit < 0 {
		return nil, status.Errorf(codes.InvalidArgument, "ageLimit is negative: %d", req.AgeLimit)
	}
	if err := checkFilter(req.Filter); err != nil {
		return nil, err
	}
	records, err := s.cfg.Cache.DiskUsage(ctx, req.Filter, time.Duration(req.AgeLimit))
	if err != nil {
		return nil, err
	}
	resp := &control.DiskUsageResponse{Record: make([]*control.UsageRecord, len(records))}
	for i, u := range records {
		resp.Record[i] = usageToProto(u)
	}
	return resp, nil
}

// Prune removes cache records and streams each one that went (CTL-107 to -113).
func (s *Server) Prune(req *control.PruneRequest, stream control.Control_PruneServer) error {
	for name, v := range map[string]int64{
		"keepDuration": req.KeepDuration, "reservedSpace": req.ReservedSpace,
		"maxUsedSpace": req.MaxUsedSpace, "minFreeSpace": req.MinFreeSpace,
	} {
		if v < 0 {
			return status.Errorf(codes.InvalidArgument, "%s is negative: %d", name, v)
		}
	}
	if err := checkFilter(req.Filter); err != nil {
		return err
	}
	return s.cfg.Cache.Prune(stream.Context(), cache.PruneOptions{
		Filters:       req.Filter,
		All:           req.All,
		KeepDuration:  time.Duration(req.KeepDuration),
		ReservedSpace: req.ReservedSpace,
		MaxUsedSpace:  req.MaxUsedSpace,
		MinFreeSpace:  req.MinFreeSpace,
		Rule:          "prune",
	}, func(u cache.Usage) error { return stream.Send(usageToProto(u)) })
}

func checkFilter(filter []string) error {
	if _, err := filters.ParseAll(filter...); err != nil {
		return status.Errorf(codes.InvalidArgument, "filter: %v", err)
	}
	return nil
}

func usageToProto(u cache.Usage) *control.UsageRecord {
	out := &control.UsageRecord{
		ID: u.ID, Mutable: u.Mutable, InUse: u.InUse, Size: u.Size, Parents: u.Parents,
		CreatedAt: timestamppb.New(u.CreatedAt), UsageCount: int64(u.UsageCount),
		Description: text(u.Description), RecordType: string(u.Type),
	}
	if !u.LastUsedAt.IsZero() {
		out.LastUsedAt = timestamppb.New(u.LastUsedAt)
	}
	return out
}
