package control

import (
	"context"
	"io"
	"log/slog"
	"maps"
	"strings"

	"github.com/kilnbuild/kiln/control/build"
	"github.com/kilnbuild/kiln/control/history"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/internal/steplog"
	control "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// ListenBuildHistory streams records of builds (CTL-136 to -139).
func (s *Server) ListenBuildHistory(req *control.BuildHistoryRequest, stream control.Control_ListenBuildHistoryServer) error {
	if err := sendTimestamp(stream); err != nil {
		return err
	}
	return s.cfg.History.Listen(stream.Context(), req, stream.Send)
}

// UpdateBuildHistory pins, unpins or deletes a record (CTL-140).
func (s *Server) UpdateBuildHistory(_ context.Context, req *control.UpdateBuildHistoryRequest) (*control.UpdateBuildHistoryResponse, error) {
	if req.Ref == "" {
		return nil, status.Error(codes.InvalidArgument, "Ref is missing")
	}
	if err := s.cfg.History.Update(req); err != nil {
		return nil, err
	}
	return &control.UpdateBuildHistoryResponse{}, nil
}

// Record returns the functions that tell h of builds beginning and ending.
func Record(h *history.Log, log *slog.Logger) (started, ended func(*build.Build)) {
	started = func(b *build.Build) {
		if !b.Request().Internal {
			h.Started(historyRecord(b))
		}
	}
	ended = func(b *build.Build) {
		if b.Request().Internal {
			return
		}
		rec := historyRecord(b)
		out := b.Outcome()
		rec.CompletedAt = timestamppb.New(out.Ended)
		rec.ExporterResponse = out.Response
		rec.NumTotalSteps = int32(out.Stats.Total)
		rec.NumCachedSteps = int32(out.Stats.Cached)
		rec.NumCompletedSteps = int32(out.Stats.Completed)
		rec.NumWarnings = int32(out.Warnings)
		if out.Err != nil {
			rec.Error = status.Convert(toGRPC(context.Background(), out.Err)).Proto()
			rec.Error.Details = nil
		}
		rec.Result = &control.BuildResultInfo{Results: map[int64]*control.Descriptor{}}
		for i, d := range out.Results {
			desc := &control.Descriptor{MediaType: d.MediaType, Digest: d.Digest.String(), Size: d.Size, Annotations: d.Annotations}
			rec.Result.Results[int64(i)] = desc
			if i == 0 {
				rec.Result.ResultDeprecated = desc
			}
		}
		told, err := b.Events().Next(b.Context())
		if err != nil && err != io.EOF {
			log.Error("a build's log is lost", "build", rec.Ref, "err", err)
		}
		told, logs := withoutStored(told)
		if err := h.KeepLogs(rec.Ref, logs); err != nil {
			log.Error("the log of a step is lost", "build", rec.Ref, "err", err)
		}
		if err := h.Completed(rec, statusMessages(told)); err != nil {
			log.Error("a build's history record is lost", "build", rec.Ref, "err", err)
		}
	}
	return started, ended
}

// withoutStored takes out what vertices printed whose whole logs are stored, and
// returns those. In the place of the first of it stays an empty one, by which
// history.Replay knows where the log belongs.
func withoutStored(events []progress.Event) (rest []progress.Event, logs map[string]*steplog.Log) {
	logs = map[string]*steplog.Log{}
	for _, e := range events {
		if e.Stored != nil {
			logs[e.Stored.Vertex.String()] = e.Stored.Log
		}
	}
	marked, rest := map[string]bool{}, make([]progress.Event, 0, len(events))
	for _, e := range events {
		switch {
		case e.Stored != nil:
			continue
		case e.Log != nil && logs[e.Log.Vertex.String()] != nil:
			vertex := e.Log.Vertex.String()
			if marked[vertex] {
				continue
			}
			marked[vertex] = true
			e = progress.Event{Log: &progress.Log{Vertex: e.Log.Vertex, Stream: e.Log.Stream, Timestamp: e.Log.Timestamp}}
		}
		rest = append(rest, e)
	}
	return rest, logs
}

func historyRecord(b *build.Build) *control.BuildHistoryRecord {
	req := b.Request()
	attrs := make(map[string]string, len(req.Opts))
	maps.Copy(attrs, req.Opts)
	return &control.BuildHistoryRecord{
		Ref: req.Ref, Frontend: req.Frontend, FrontendAttrs: attrs, Exporters: withoutSecrets(req.Exporters),
		CreatedAt: timestamppb.New(b.Started()),
	}
}

// withoutSecrets leaves out attributes that carry credentials.
func withoutSecrets(in []*control.Exporter) []*control.Exporter {
	out := make([]*control.Exporter, len(in))
	for i, ex := range in {
		attrs := map[string]string{}
		for k, v := range ex.Attrs {
			if !strings.Contains(k, "token") && !strings.Contains(k, "secret") && !strings.Contains(k, "password") {
				attrs[k] = v
			}
		}
		out[i] = &control.Exporter{Type: ex.Type, Attrs: attrs}
	}
	return out
}
