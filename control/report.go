package control

import (
	"encoding/json"
	"slices"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/client"
	control "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// usageService is what kiln tells beside the protocol: see client.UsageReport.
var usageService = grpc.ServiceDesc{
	ServiceName: client.UsageService,
	HandlerType: (*any)(nil),
	Streams: []grpc.StreamDesc{{
		StreamName:    client.UsageMethod,
		ServerStreams: true,
		Handler: func(srv any, stream grpc.ServerStream) error {
			var req control.DiskUsageRequest
			if err := stream.RecvMsg(&req); err != nil {
				return err
			}
			return srv.(*Server).usageReport(&req, stream)
		},
	}},
}

// reportBatch is how many records go in one message.
const reportBatch = 1000

func (s *Server) usageReport(req *control.DiskUsageRequest, stream grpc.ServerStream) error {
	if err := checkFilter(req.Filter); err != nil {
		return err
	}
	space, err := s.cfg.Cache.Space(stream.Context(), s.cfg.History.LogsDir())
	if err != nil {
		return err
	}
	if err := sendReport(stream, client.UsageReport{Space: spaceParts(space)}); err != nil {
		return err
	}
	details, err := s.cfg.Cache.Details(stream.Context(), req.Filter, s.cfg.GCRules)
	if err != nil {
		return err
	}
	for batch := range slices.Chunk(details, reportBatch) {
		records := make(map[string]client.RecordDetail, len(batch))
		for _, d := range batch {
			records[d.ID] = client.RecordDetail{Users: d.Users, Rule: d.Rule, Due: d.Due}
		}
		if err := sendReport(stream, client.UsageReport{Records: records}); err != nil {
			return err
		}
	}
	return nil
}

func sendReport(stream grpc.ServerStream, r client.UsageReport) error {
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return stream.SendMsg(wrapperspb.Bytes(data))
}

func spaceParts(s cache.Space) []client.SpacePart {
	return []client.SpacePart{
		{Name: "Records", Bytes: s.Records},
		{Name: "Being written", Bytes: s.Writing},
		{Name: "Being deleted", Bytes: s.Removed},
		{Name: "Database", Bytes: s.Database},
		{Name: "Reserve for a full disk", Bytes: s.Reserve},
		{Name: "Logs of steps", Bytes: s.Logs},
		{Name: "Directories and the rest", Bytes: s.Other},
	}
}
