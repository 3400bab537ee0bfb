package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	control "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Kiln's own service beside the protocol's. Its one method takes a
// control.DiskUsageRequest and streams UsageReports as JSON in
// google.protobuf.BytesValue; the client joins them.
const (
	UsageService = "kiln.v1.Usage"
	UsageMethod  = "Report"
)

// UsageReport is what kilnd tells of its cache beyond the protocol.
type UsageReport struct {
	// Space says where the bytes below the state directory are; each is in
	// exactly one part.
	Space   []SpacePart             `json:"space,omitempty"`
	Records map[string]RecordDetail `json:"records,omitempty"` // by id
}

// SpacePart is a part of the state directory.
type SpacePart struct {
	Name  string `json:"name"`
	Bytes int64  `json:"bytes"` // in allocated blocks
}

// RecordDetail is what keeps a record and what will remove it.
type RecordDetail struct {
	Users []string `json:"users,omitempty"`
	Rule  string   `json:"rule,omitempty"` // of the garbage collection
	Due   bool     `json:"due,omitempty"`  // the rule, applied now, would
}

// ErrNoReport: the daemon is not kilnd, and has no usage reports.
var ErrNoReport = errors.New("the daemon gives no usage reports")

// UsageReport asks for a report on the records that match one of filters, or on
// all. ErrNoReport if the daemon doesn't know what that is.
func (c *Client) UsageReport(ctx context.Context, filters ...string) (*UsageReport, error) {
	fail := func(err error) (*UsageReport, error) {
		if status.Code(err) == codes.Unimplemented {
			return nil, ErrNoReport
		}
		return nil, fmt.Errorf("ask %s for a usage report: %w", c.addr, err)
	}
	stream, err := c.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/"+UsageService+"/"+UsageMethod)
	if err != nil {
		return fail(err)
	}
	err = errors.Join(stream.SendMsg(&control.DiskUsageRequest{Filter: filters}), stream.CloseSend())
	if err != nil && !errors.Is(err, io.EOF) { // then RecvMsg tells why
		return fail(err)
	}
	report := &UsageReport{}
	for {
		var msg wrapperspb.BytesValue
		err := stream.RecvMsg(&msg)
		if errors.Is(err, io.EOF) {
			return report, nil
		}
		if err == nil {
			err = json.Unmarshal(msg.Value, report) // adds to what is there
		}
		if err != nil {
			return fail(err)
		}
	}
}
