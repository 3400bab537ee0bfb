package dockerfile

import (
	"fmt"
	"strings"

	"github.com/agext/levenshtein"
	"github.com/kilnbuild/kiln/client/llb"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
)

// toRanges turns places in the Dockerfile into the wire's.
func toRanges(ranges []parser.Range) []*pb.Range {
	out := make([]*pb.Range, 0, len(ranges))
	for _, r := range ranges {
		out = append(out, &pb.Range{
			Start: &pb.Position{Line: int32(r.Start.Line), Character: int32(r.Start.Character)},
			End:   &pb.Position{Line: int32(r.End.Line), Character: int32(r.End.Character)},
		})
	}
	return out
}

// withSource lets clients print the lines that err is about.
func withSource(err error, file *llb.SourceMap, ranges []parser.Range) error {
	if err == nil || file == nil {
		return err
	}
	return errdefs.WithSource(err, &errdefs.Source{Info: file.Info(), Ranges: toRanges(ranges)})
}

// suggestion is an error about a word that is nearly another one.
type suggestion struct {
	err   error
	match string
}

func (e *suggestion) Error() string {
	return fmt.Sprintf("%s (did you mean %s?)", e.err, e.match)
}

func (e *suggestion) Unwrap() error { return e.err }

// suggest adds to err, about word, the option that word may have been meant as.
func suggest(err error, word string, options []string) error {
	if match := nearest(word, options); match != "" && err != nil {
		return &suggestion{err, match}
	}
	return err
}

// nearest returns the option that differs least from word, by at most two
// letters. If word is itself an option, the mistake is elsewhere: "".
func nearest(word string, options []string) string {
	const tooFar = 3
	match, best := "", tooFar
	for _, o := range options {
		if o == word {
			return ""
		}
		if d := levenshtein.Distance(word, o, nil); d < best {
			match, best = o, d
		}
	}
	return match
}

// commonImages are suggested for misspelt base images.
func commonImages() []string {
	var out []string
	for name := range strings.FieldsSeq("alpine busybox centos debian golang ubuntu fedora") {
		out = append(out, name, "docker.io/library/"+name, name+":latest", "docker.io/library/"+name+":latest")
	}
	return out
}
