package dockerfile

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/kilnbuild/kiln/frontend"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"google.golang.org/protobuf/encoding/protojson"
)

// answer answers a question about the Dockerfile instead of building it.
func (b *build) answer(ctx context.Context, id string) (*frontend.Result, error) {
	var a *answer
	var err error
	switch id {
	case describeRequest.Name:
		a = describe()
	case outlineRequest.Name:
		a, err = b.answerOutline(ctx)
	case targetsRequest.Name:
		a, err = b.answerTargets()
	case "frontend.lint":
		a, err = b.answerLint(ctx)
	case "frontend.convertllb":
		a, err = b.answerLLB(ctx)
	default:
		return nil, errdefs.NewUnsupportedSubrequestError(id)
	}
	if err != nil {
		return nil, b.withSources(err)
	}
	return a.result()
}

// answer is a value and how it is printed.
type answer struct {
	version string
	value   any
	print   func(w io.Writer) error // nil: the answer is for machines alone
	status  *int                    // exit status for a client that prints it
}

func (a *answer) result() (*frontend.Result, error) {
	dt, err := json.MarshalIndent(a.value, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode answer: %w", err)
	}
	md := map[string][]byte{"result.json": dt, "version": []byte(a.version)}
	if a.print != nil {
		var buf bytes.Buffer
		if err := a.print(&buf); err != nil {
			return nil, fmt.Errorf("print answer: %w", err)
		}
		md["result.txt"] = buf.Bytes()
	}
	if a.status != nil {
		md["result.statuscode"] = fmt.Appendf(nil, "%d", *a.status)
	}
	return &frontend.Result{Metadata: md}, nil
}

// request describes a question that can be asked.
type request struct {
	Name        string      `json:"name"`
	Version     string      `json:"version"`
	Type        string      `json:"type"`
	Description string      `json:"description"`
	Opts        []namedItem `json:"opts"`
	Inputs      []namedItem `json:"inputs"`
	Metadata    []namedItem `json:"metadata"`
	Refs        []namedItem `json:"refs"`
}

type namedItem struct {
	Name        string `json:"name"`
	Description string `json:"description"`
}

var printable = []namedItem{{Name: "result.json"}, {Name: "result.txt"}}

var (
	describeRequest = request{
		Name: "frontend.subrequests.describe", Version: "1.0.0", Type: "rpc",
		Description: "List available subrequest types", Metadata: printable,
	}
	outlineRequest = request{
		Name: "frontend.outline", Version: "1.0.0", Type: "rpc",
		Description: "List all parameters current build target supports",
		Opts:        []namedItem{{Name: "target", Description: "Target build stage"}}, Metadata: printable,
	}
	targetsRequest = request{
		Name: "frontend.targets", Version: "1.0.0", Type: "rpc",
		Description: "List all targets current build supports", Opts: []namedItem{}, Metadata: printable,
	}
)

// describe lists the questions. Lint and LLB conversion are left out: clients
// know of them by other means.
func describe() *answer {
	all := []request{outlineRequest, targetsRequest, describeRequest}
	return &answer{version: describeRequest.Version, value: all, print: func(w io.Writer) error {
		t := newTable(w, 1)
		t.row("NAME", "VERSION", "DESCRIPTION")
		for _, r := range all {
			t.row(strings.TrimPrefix(r.Name, "frontend."), r.Version, r.Description)
		}
		return t.flush()
	}}
}

func (b *build) answerOutline(ctx context.Context) (*answer, error) {
	c, err := b.convert(ctx, convertOptions{warn: b.showWarning(ctx)})
	if err != nil {
		return nil, err
	}
	o := c.outlineOf()
	return &answer{version: outlineRequest.Version, value: o, print: o.print}, nil
}

func (o outlineResult) print(w io.Writer) error {
	var errs []error
	if o.Name != "" || o.Description != "" {
		t := newTable(w, 1)
		t.row("TARGET:", firstOf(o.Name, "(default)"))
		if o.Description != "" {
			t.row("DESCRIPTION:", o.Description)
		}
		errs = append(errs, t.flush(), blank(w))
	}
	if len(o.Args) > 0 {
		t := newTable(w, 3)
		t.row("BUILD ARG", "VALUE", "DESCRIPTION")
		for _, a := range o.Args {
			t.row(a.Name, a.Value, a.Description)
		}
		errs = append(errs, t.flush(), blank(w))
	}
	errs = append(errs, printNeeds(w, "SECRET", o.Secrets), printNeeds(w, "SSH", o.SSH))
	return errors.Join(errs...)
}

func printNeeds(w io.Writer, title string, needs []outlineSecret) error {
	if len(needs) == 0 {
		return nil
	}
	t := newTable(w, 3)
	t.row(title, "REQUIRED")
	for _, s := range needs {
		required := ""
		if s.Required {
			required = "true"
		}
		t.row(s.Name, required)
	}
	return errors.Join(t.flush(), blank(w))
}

func blank(w io.Writer) error {
	_, err := fmt.Fprintln(w)
	return err
}

// table prints rows in columns.
type table struct {
	w   *tabwriter.Writer
	err error
}

func newTable(w io.Writer, padding int) *table {
	return &table{w: tabwriter.NewWriter(w, 0, 0, padding, ' ', 0)}
}

func (t *table) row(cells ...string) {
	_, err := fmt.Fprintln(t.w, strings.Join(cells, "\t"))
	t.err = errors.Join(t.err, err)
}

func (t *table) flush() error { return errors.Join(t.err, t.w.Flush()) }

// targetList is the answer to a targets request.
type targetList struct {
	Targets []targetInfo `json:"targets"`
	Sources [][]byte     `json:"sources"`
}

type targetInfo struct {
	Name        string       `json:"name,omitempty"`
	Default     bool         `json:"default,omitempty"`
	Description string       `json:"description,omitempty"`
	Base        string       `json:"base,omitempty"`
	Platform    string       `json:"platform,omitempty"`
	Location    *pb.Location `json:"location,omitempty"`
}

func (b *build) answerTargets() (*answer, error) {
	file, err := parser.Parse(bytes.NewReader(b.file.Data))
	if err != nil {
		return nil, err
	}
	stages, _, err := instructions.Parse(file.AST, nil)
	if err != nil {
		return nil, err
	}
	l := targetList{Sources: [][]byte{b.file.Data}}
	for i, s := range stages {
		l.Targets = append(l.Targets, targetInfo{
			Name:        s.Name,
			Description: s.DocComment,
			Default:     i == len(stages)-1,
			Base:        s.BaseName,
			Platform:    s.Platform,
			Location:    toLocation(s.Location),
		})
	}
	return &answer{version: targetsRequest.Version, value: l, print: l.print}, nil
}

func (l targetList) print(w io.Writer) error {
	t := newTable(w, 1)
	t.row("TARGET", "DESCRIPTION")
	for _, target := range l.Targets {
		name := target.Name
		switch {
		case target.Default && name == "":
			name = "(default)"
		case target.Default:
			name += " (default)"
		}
		t.row(name, target.Description)
	}
	return t.flush()
}

// answerLLB answers with the LLB of the target.
func (b *build) answerLLB(ctx context.Context) (*answer, error) {
	c, err := b.convert(ctx, convertOptions{warn: b.showWarning(ctx)})
	if err != nil {
		return nil, err
	}
	def, err := c.result.state.Marshal(c.marshalOptions()...)
	if err != nil {
		return nil, fmt.Errorf("failed to marshal LLB definition: %w", err)
	}
	var out struct {
		Def      map[digest.Digest]json.RawMessage `json:"def"`
		Metadata map[string]opMetadata             `json:"metadata"`
		Source   json.RawMessage                   `json:"source"`
	}
	out.Def = map[digest.Digest]json.RawMessage{}
	for _, dt := range def.Def {
		var op pb.Op
		if err := op.UnmarshalVT(dt); err != nil {
			return nil, fmt.Errorf("parse op: %w", err)
		}
		if out.Def[digest.FromBytes(dt)], err = protojson.Marshal(&op); err != nil {
			return nil, fmt.Errorf("encode op: %w", err)
		}
	}
	out.Metadata = map[string]opMetadata{}
	for dgst, md := range def.Metadata {
		out.Metadata[dgst] = opMetadata{
			md.IgnoreCache, md.Description, md.ExportCache, md.Caps, md.ProgressGroup, md.LinuxResources,
		}
	}
	src := def.Source
	if src == nil {
		src = &pb.Source{}
	}
	if out.Source, err = protojson.Marshal(src); err != nil {
		return nil, fmt.Errorf("encode sources: %w", err)
	}
	return &answer{version: "0.1.0", value: out}, nil
}

// opMetadata is the metadata of an op in the form that this answer has it.
type opMetadata struct {
	IgnoreCache    bool               `json:"ignore_cache,omitempty"`
	Description    map[string]string  `json:"description,omitempty"`
	ExportCache    *pb.ExportCache    `json:"export_cache,omitempty"`
	Caps           map[string]bool    `json:"caps,omitempty"`
	ProgressGroup  *pb.ProgressGroup  `json:"progress_group,omitempty"`
	LinuxResources *pb.LinuxResources `json:"linux_resources,omitempty"`
}
