package dockerfile

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
)

// lintResult is the answer to a lint request.
type lintResult struct {
	Warnings []lintWarning    `json:"warnings"`
	Sources  []*pb.SourceInfo `json:"sources"`
	Error    *lintError       `json:"buildError,omitempty"`
}

type lintWarning struct {
	RuleName    string       `json:"ruleName"`
	Description string       `json:"description,omitempty"`
	URL         string       `json:"url,omitempty"`
	Detail      string       `json:"detail,omitempty"`
	Location    *pb.Location `json:"location,omitempty"`
}

type lintError struct {
	Message  string       `json:"message"`
	Location *pb.Location `json:"location"`
}

// answerLint gathers the findings. Without a target, all stages are looked at.
// An error in the Dockerfile is a finding, too.
func (b *build) answerLint(ctx context.Context) (*answer, error) {
	r := lintResult{Sources: []*pb.SourceInfo{b.file.Info()}}
	opt := convertOptions{
		allStages: b.cfg.target == "",
		warn: func(rule, description, url, msg string, where []parser.Range) {
			r.Warnings = append(r.Warnings, lintWarning{rule, description, url, msg, &pb.Location{Ranges: toRanges(where)}})
		},
	}
	if _, err := b.convert(ctx, opt); err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		r.Error = newLintError(err)
	}
	status := 0
	if len(r.Warnings) > 0 || r.Error != nil {
		status = 1
	}
	return &answer{version: "1.0.0", value: r, print: r.print, status: &status}, nil
}

func newLintError(err error) *lintError {
	e := &lintError{Message: err.Error(), Location: &pb.Location{}}
	var located *parser.LocationError
	if errors.As(err, &located) {
		e.Location.Ranges = toRanges(mergeRanges(slices.Concat(located.Locations...)))
	}
	return e
}

// mergeRanges joins ranges that share lines.
func mergeRanges(ranges []parser.Range) []parser.Range {
	slices.SortStableFunc(ranges, func(a, b parser.Range) int { return cmp.Compare(a.Start.Line, b.Start.Line) })
	var out []parser.Range
	for _, r := range ranges {
		if n := len(out); n > 0 && r.Start.Line <= out[n-1].End.Line {
			out[n-1].End.Line = max(out[n-1].End.Line, r.End.Line)
			continue
		}
		out = append(out, r)
	}
	return out
}

func (r lintResult) print(w io.Writer) error {
	warnings := slices.Clone(r.Warnings)
	slices.SortStableFunc(warnings, func(a, b lintWarning) int {
		return cmp.Compare(firstLine(a.Location), firstLine(b.Location))
	})
	for _, warning := range warnings {
		if err := warning.print(w, r.Sources[0]); err != nil {
			return err
		}
	}
	return nil
}

func (lw lintWarning) print(w io.Writer, info *pb.SourceInfo) error {
	head := "\nWARNING: " + lw.RuleName
	if lw.URL != "" {
		head += " - " + lw.URL
	}
	if _, err := fmt.Fprintf(w, "%s\n%s\n", head, lw.Detail); err != nil {
		return err
	}
	src := errdefs.Source{Info: info, Ranges: lw.Location.Ranges}
	return src.Print(w)
}
