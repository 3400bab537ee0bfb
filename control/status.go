package control

import (
	"cmp"
	"context"
	"errors"
	"io"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/kilnbuild/kiln/control/build"
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
	// maxPart bounds the bytes of one message, roughly (CTL-075): a client that
	// joins late gets all that happened so far at once.
	maxPart = 1 << 20
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
	b, told, err := s.find(ctx, req.Ref)
	var refused *build.RefusedError
	if errors.As(err, &refused) {
		// The answer to Solve says why. An error here might reach the client
		// first, who would show that instead.
		return nil
	}
	if err != nil {
		return err
	}
	if b == nil {
		return s.cfg.History.Replay(req.Ref, told, stream.Send)
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
		if err := sendAll(stream, statusMessages(events)); err != nil {
			return err
		}
		r.Linger(ctx, statusInterval)
	}
}

// find returns the build named ref while it runs, or what it told if it has ended
// (CTL-061): the history has whole logs. Others are waited for.
func (s *Server) find(ctx context.Context, ref string) (b *build.Build, told []*control.StatusResponse, err error) {
	b, err = s.cfg.Builds.Get(ctx, ref, 0)
	if err == nil && !b.Ended() {
		return b, nil, nil
	}
	lingers := err == nil
	told, ended, err := s.cfg.History.Told(ref)
	if ended || err != nil {
		return nil, told, err
	}
	if lingers { // it isn't in the history yet, or won't be
		return b, nil, nil
	}
	b, err = s.cfg.Builds.Get(ctx, ref, statusWait)
	return b, nil, err
}

func sendAll(stream control.Control_StatusServer, msgs iter.Seq[*control.StatusResponse]) error {
	for msg := range msgs {
		if err := stream.Send(msg); err != nil {
			return err
		}
	}
	return nil
}

// sendTimestamp lets clients correct their clock's skew (CTL-060).
func sendTimestamp(stream grpc.ServerStream) error {
	return stream.SendHeader(metadata.Pairs("buildkit-current-timestamp", time.Now().Format(time.RFC3339Nano)))
}

// statusMessages translates events into messages of a bounded size, sorted
// inside each (CTL-077).
func statusMessages(events []progress.Event) iter.Seq[*control.StatusResponse] {
	return func(yield func(*control.StatusResponse) bool) {
		msg, size := &control.StatusResponse{}, 0
		for _, e := range events {
			if e.Stored != nil { // clients are told what is within the limits
				continue
			}
			for _, part := range splitLog(e) {
				n := eventSize(part)
				if size > 0 && size+n > maxPart {
					if !yield(sorted(msg)) {
						return
					}
					msg, size = &control.StatusResponse{}, 0
				}
				size += n
				addEvent(msg, part)
			}
		}
		yield(sorted(msg))
	}
}

// sorted is msg with what is in it in the order of time.
func sorted(msg *control.StatusResponse) *control.StatusResponse {
	slices.SortStableFunc(msg.Vertexes, func(a, b *control.Vertex) int { return compareTimes(a.Started, b.Started) })
	slices.SortStableFunc(msg.Statuses, func(a, b *control.VertexStatus) int { return compareTimes(a.Timestamp, b.Timestamp) })
	slices.SortStableFunc(msg.Logs, func(a, b *control.VertexLog) int { return compareTimes(a.Timestamp, b.Timestamp) })
	return msg
}

// splitLog cuts a log event that is too long for one message.
func splitLog(e progress.Event) []progress.Event {
	if e.Log == nil || len(e.Log.Data) <= maxPart {
		return []progress.Event{e}
	}
	var out []progress.Event
	for data := range slices.Chunk(e.Log.Data, maxPart) {
		piece := *e.Log
		piece.Data = data
		out = append(out, progress.Event{Log: &piece})
	}
	return out
}

// eventSize is about what e takes in a message.
func eventSize(e progress.Event) int {
	const digestAndTimes = 128
	switch {
	case e.Vertex != nil:
		return digestAndTimes + len(e.Vertex.Name) + len(e.Vertex.Error) + digestAndTimes*len(e.Vertex.Inputs)
	case e.Status != nil:
		return digestAndTimes + len(e.Status.ID) + len(e.Status.Name)
	case e.Log != nil:
		return digestAndTimes + len(e.Log.Data)
	case e.Warning != nil:
		n := digestAndTimes + len(e.Warning.Short) + len(e.Warning.URL)
		for _, d := range e.Warning.Detail {
			n += len(d)
		}
		if info, ok := e.Warning.SourceInfo.(*pb.SourceInfo); ok {
			n += len(info.GetData())
		}
		return n
	}
	return 0
}

func addEvent(msg *control.StatusResponse, e progress.Event) {
	switch {
	case e.Vertex != nil:
		msg.Vertexes = append(msg.Vertexes, vertexToProto(e.Vertex))
	case e.Status != nil:
		msg.Statuses = append(msg.Statuses, statusToProto(e.Status))
	case e.Log != nil:
		msg.Logs = append(msg.Logs, &control.VertexLog{
			Vertex: e.Log.Vertex.String(), Stream: int64(e.Log.Stream), Msg: e.Log.Data,
			Timestamp: timestamppb.New(e.Log.Timestamp),
		})
	case e.Warning != nil:
		msg.Warnings = append(msg.Warnings, warningToProto(e.Warning))
	}
}

// text makes s fit for a message, which can't hold anything but UTF-8: one file
// name that isn't must not end the stream.
func text(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

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
		Digest: v.Digest.String(), Name: text(v.Name), Cached: v.Cached, Error: text(v.Error),
		Started: timestamp(v.Started), Completed: timestamp(v.Completed),
	}
	for _, in := range v.Inputs {
		out.Inputs = append(out.Inputs, in.String())
	}
	if g := v.Group; g != nil {
		out.ProgressGroup = &pb.ProgressGroup{Id: text(g.ID), Name: text(g.Name), Weak: g.Weak}
	}
	return out
}

func statusToProto(s *progress.Status) *control.VertexStatus {
	return &control.VertexStatus{
		ID: text(s.ID), Vertex: s.Vertex.String(), Name: text(s.Name), Current: s.Current, Total: s.Total,
		Timestamp: timestamppb.New(s.Timestamp), Started: timestamp(s.Started), Completed: timestamp(s.Completed),
	}
}

func warningToProto(w *progress.Warning) *control.VertexWarning {
	out := &control.VertexWarning{
		Vertex: w.Vertex.String(), Level: int64(w.Level), Short: w.Short, Detail: w.Detail, Url: text(w.URL),
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
