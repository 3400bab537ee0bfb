package control

import (
	"cmp"
	"io"
	"slices"
	"time"

	"github.com/kilnbuild/kiln/internal/progress"
	control "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/solver/pb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	// statusWait is how long Status waits for its build (CTL-062).
	statusWait = 6 * time.Second
	// statusInterval is the least time between two messages, so that a chatty
	// step costs few of them.
	statusInterval = 50 * time.Millisecond
	// maxLogs bounds the log bytes of one message (CTL-075).
	maxLogs = 1 << 20
)

// Status streams what a build tells, from its beginning to its end.
func (s *Server) Status(req *control.StatusRequest, stream control.Control_StatusServer) error {
	if err := sendTimestamp(stream); err != nil {
		return err
	}
	if req.Ref == "" {
		return status.Error(codes.InvalidArgument, "Ref is missing")
	}
	ctx := stream.Context()
	b, err := s.cfg.Builds.Get(ctx, req.Ref, statusWait)
	if err != nil {
		return err
	}
	r := b.Events()
	for {
		events, err := r.Next(ctx)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		for _, msg := range statusMessages(events) {
			if err := stream.Send(msg); err != nil {
				return err
			}
		}
		r.Linger(ctx, statusInterval)
	}
}

// sendTimestamp lets clients correct their clock's skew (CTL-060).
func sendTimestamp(stream grpc.ServerStream) error {
	return stream.SendHeader(metadata.Pairs("buildkit-current-timestamp", time.Now().Format(time.RFC3339Nano)))
}

// statusMessages translates events, sorted inside a message (CTL-077) and split
// where the logs are too much for one (CTL-075).
func statusMessages(events []progress.Event) []*control.StatusResponse {
	msg := &control.StatusResponse{}
	var logs []*control.VertexLog
	for _, e := range events {
		switch {
		case e.Vertex != nil:
			msg.Vertexes = append(msg.Vertexes, vertexToProto(e.Vertex))
		case e.Status != nil:
			msg.Statuses = append(msg.Statuses, statusToProto(e.Status))
		case e.Log != nil:
			logs = append(logs, &control.VertexLog{
				Vertex: e.Log.Vertex.String(), Stream: int64(e.Log.Stream), Msg: e.Log.Data,
				Timestamp: timestamppb.New(e.Log.Timestamp),
			})
		case e.Warning != nil:
			msg.Warnings = append(msg.Warnings, warningToProto(e.Warning))
		}
	}
	slices.SortStableFunc(msg.Vertexes, func(a, b *control.Vertex) int { return compareTimes(a.Started, b.Started) })
	slices.SortStableFunc(msg.Statuses, func(a, b *control.VertexStatus) int { return compareTimes(a.Timestamp, b.Timestamp) })
	slices.SortStableFunc(logs, func(a, b *control.VertexLog) int { return compareTimes(a.Timestamp, b.Timestamp) })

	out := []*control.StatusResponse{msg}
	size := 0
	for _, l := range logs {
		if size+len(l.Msg) > maxLogs && len(msg.Logs) > 0 {
			msg, size = &control.StatusResponse{}, 0
			out = append(out, msg)
		}
		msg.Logs = append(msg.Logs, l)
		size += len(l.Msg)
	}
	return out
}

// compareTimes orders missing times first.
func compareTimes(a, b *timestamppb.Timestamp) int {
	if a == nil || b == nil {
		return cmp.Compare(boolInt(a != nil), boolInt(b != nil))
	}
	return a.AsTime().Compare(b.AsTime())
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

func vertexToProto(v *progress.Vertex) *control.Vertex {
	out := &control.Vertex{
		Digest: v.Digest.String(), Name: v.Name, Cached: v.Cached, Error: v.Error,
		Started: timestamp(v.Started), Completed: timestamp(v.Completed),
	}
	for _, in := range v.Inputs {
		out.Inputs = append(out.Inputs, in.String())
	}
	if g := v.Group; g != nil {
		out.ProgressGroup = &pb.ProgressGroup{Id: g.ID, Name: g.Name, Weak: g.Weak}
	}
	return out
}

func statusToProto(s *progress.Status) *control.VertexStatus {
	return &control.VertexStatus{
		ID: s.ID, Vertex: s.Vertex.String(), Name: s.Name, Current: s.Current, Total: s.Total,
		Timestamp: timestamppb.New(s.Timestamp), Started: timestamp(s.Started), Completed: timestamp(s.Completed),
	}
}

func warningToProto(w *progress.Warning) *control.VertexWarning {
	out := &control.VertexWarning{
		Vertex: w.Vertex.String(), Level: int64(w.Level), Short: w.Short, Detail: w.Detail, Url: w.URL,
	}
	out.Info, _ = w.SourceInfo.(*pb.SourceInfo)
	out.Ranges, _ = w.Ranges.([]*pb.Range)
	return out
}

func timestamp(t *time.Time) *timestamppb.Timestamp {
	if t == nil {
		return nil
	}
	return timestamppb.New(*t)
}
