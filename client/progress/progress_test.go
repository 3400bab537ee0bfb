package progress

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	control "github.com/moby/buildkit/api/services/control"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/types/known/timestamppb"
)

func messages() []*control.StatusResponse {
	dgst := digest.FromString("v").String()
	begin, end := timestamppb.New(time.Unix(100, 0)), timestamppb.New(time.Unix(101, 0))
	return []*control.StatusResponse{
		{Vertexes: []*control.Vertex{{Digest: dgst, Name: "a step", Started: begin}}},
		{Logs: []*control.VertexLog{{Vertex: dgst, Stream: 1, Msg: []byte("a line\n"), Timestamp: begin}}},
		{Warnings: []*control.VertexWarning{{Vertex: dgst, Level: 1, Short: []byte("beware")}}},
		{Vertexes: []*control.Vertex{{Digest: dgst, Name: "a step", Started: begin, Completed: end}}},
	}
}

func drawn(t *testing.T, mode string) string {
	t.Helper()
	var out bytes.Buffer
	d, err := Start(t.Context(), &out, mode)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range messages() {
		d.Show(m)
	}
	if err := d.Wait(); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// compat: BCL-021, BCL-051, BCL-052
func TestModes(t *testing.T) {
	for _, mode := range []string{"plain", "auto"} { // a buffer is no terminal
		out := drawn(t, mode)
		for _, want := range []string{"#1 a step", "a line", "#1 DONE 1.0s"} {
			if !strings.Contains(out, want) {
				t.Errorf("%s: %q lacks %q", mode, out, want)
			}
		}
	}
	if out := drawn(t, "quiet"); out != "" {
		t.Errorf("quiet: %q", out)
	}
	if _, err := Start(t.Context(), &bytes.Buffer{}, "loud"); err == nil || !strings.Contains(err.Error(), "loud") {
		t.Errorf("error %v", err)
	}
}

// compat: BCL-053
func TestRawJSON(t *testing.T) {
	lines := strings.Split(strings.TrimSpace(drawn(t, "rawjson")), "\n")
	if len(lines) != len(messages()) {
		t.Fatalf("%d lines: %q", len(lines), lines)
	}
	for i, l := range lines {
		want, err := json.Marshal(Message(messages()[i]))
		if err != nil {
			t.Fatal(err)
		}
		if l != string(want) {
			t.Errorf("line %d is %s, want %s", i, l, want)
		}
	}
}
