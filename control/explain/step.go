package explain

import (
	"path"
	"regexp"
	"strconv"
	"strings"

	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/solver"
)

// step is what stays the same of a step when its content changes: by it the
// same step of an earlier build is found.
type step struct {
	Kind  string // as ops.Kind
	Stage string // of the Dockerfile
	Index int    // in the stage, from 1; 0 if it isn't numbered
	Text  string // the name without place and digests, or its hash if it is long
}

// inlineDocument is the name of steps that make the file of a here-document, which
// another one copies or runs.
const inlineDocument = "[internal] preparing inline document"

// hereDocument is what such a file is called, before its name.
const hereDocument = "here-document "

// written is what people know a file by that s writes.
func (s step) written(file string) string {
	if s.Text == inlineDocument {
		return hereDocument + path.Base(file) + " in the Dockerfile"
	}
	return "content of " + file
}

// maxText bounds the text that is kept of a step.
const maxText = 96

var pinned = regexp.MustCompile(`@sha256:[0-9a-f]{64}`)

// placed reads the name of a Dockerfile's step: "[linux/amd64 build 2/5] RUN make".
func placed(name string) (stage string, index int, text string, ok bool) {
	place, text, ok := strings.Cut(strings.TrimPrefix(name, "["), "] ")
	if !ok || !strings.HasPrefix(name, "[") {
		return "", 0, "", false
	}
	at := strings.LastIndexByte(place, ' ') + 1
	n, of, ok := strings.Cut(place[at:], "/")
	if _, err := strconv.ParseUint(of, 10, 64); !ok || err != nil {
		return "", 0, "", false
	}
	if index, err := strconv.ParseUint(n, 10, 31); err == nil {
		return strings.TrimSpace(place[:at]), int(index), text, true
	}
	return "", 0, "", false
}

// stepOf reads the identity of v off its kind and its name.
func stepOf(v *solver.Vertex) step {
	s := step{Kind: ops.Kind(v), Text: v.Name}
	if stage, index, text, ok := placed(v.Name); ok {
		s.Stage, s.Index, s.Text = stage, index, text
	}
	if strings.Contains(s.Text, "@sha256:") {
		s.Text = pinned.ReplaceAllString(s.Text, "")
	}
	if len(s.Text) > maxText {
		s.Text = clip(s.Text, maxText-len(short(""))) + short(s.Text)
	}
	return s
}

// keyword is the instruction: the first word of the text.
func (s step) keyword() string {
	word, _, _ := strings.Cut(s.Text, " ")
	return word
}

// samePlace reports whether s stands where other does, and is the same sort of
// instruction.
func (s step) samePlace(other step) bool {
	return s.Index > 0 && s.Index == other.Index && s.Stage == other.Stage && s.alike(other)
}

// perhapsSamePlace is samePlace where one of the two doesn't tell its stage: a
// Dockerfile's only stage has a name from when one of its steps mounts
// something.
func (s step) perhapsSamePlace(other step) bool {
	if s.Stage == "" {
		s.Stage = other.Stage
	} else if other.Stage == "" {
		other.Stage = s.Stage
	}
	return s.samePlace(other)
}

// place is a hash of where s stands.
func (s step) place() uint64 {
	if s.Index == 0 {
		return hash("kind", s.Kind)
	}
	return hash("place", s.Kind, s.Stage, strconv.Itoa(s.Index))
}

// otherPlace is the place that s may have had when the Dockerfile's only stage had
// no name, or got one; false if it stands nowhere.
func (s step) otherPlace() (uint64, bool) {
	if s.Stage == "" {
		s.Stage = "stage-0"
	} else {
		s.Stage = ""
	}
	return s.place(), s.Index > 0
}

// alike reports whether a step may have been edited to become the other.
func (s step) alike(other step) bool {
	a, b := s.keyword(), other.keyword()
	copies := func(k string) bool { return k == "COPY" || k == "ADD" }
	return s.Kind == other.Kind && (a == b || copies(a) && copies(b))
}

// name is s as people know it.
func (s step) name() string {
	if s.Index == 0 {
		return s.Text
	}
	return "[" + strings.TrimSpace(s.Stage+" "+strconv.Itoa(s.Index)) + "] " + s.Text
}
