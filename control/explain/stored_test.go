package explain

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/internal/explanation"
)

// explained is a build that has something of everything.
func explained(steps int) *build {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	b := &build{
		Build: explanation.Build{Ref: "r", Started: at, Ended: at.Add(time.Second), Failed: true},
		Texts: []uint64{1, 1 << 63}, Args: map[string]string{"A": "x", "B": "x"},
	}
	for i := range steps {
		b.Steps = append(b.Steps, explanation.Step{Name: fmt.Sprint("cached ", i), Line: "Dockerfile:3"}, explanation.Step{
			Name: fmt.Sprint("ran ", i), Ran: true, Failed: i == 0, Duration: time.Minute, Compared: &explanation.Earlier{Ref: "before", Time: at},
			Causes: []explanation.Cause{
				{Kind: explanation.Evicted, Subject: "prune", Time: at, Certain: true},
				{Kind: explanation.Parent, Subject: "ü\n", By: []explanation.Cause{{Kind: explanation.Env, From: "a", To: "b"}}},
			},
		})
	}
	return b
}

// What is stored is read as it was, whether it is compressed or not.
func TestExplanationsAreRead(t *testing.T) {
	for _, steps := range []int{1, 1000} {
		want := explained(steps)
		data, err := want.pack()
		if err != nil {
			t.Fatal(err)
		}
		if compressed := data[0] == deflated; compressed != (steps > 1) {
			t.Errorf("of %d steps: compressed %t", steps, compressed)
		}
		if got, err := unpackBuild(data); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("of %d steps: %v, %+v", steps, err, got)
		}
	}
}

// Causes that are nested deeper than any that are made are damage.
func TestDepthOfCauses(t *testing.T) {
	b := explained(1)
	for range maxDepth {
		b.Steps[1].Causes = []explanation.Cause{{By: b.Steps[1].Causes}}
	}
	data, err := b.pack()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unpackBuild(data); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("read it: %v", err)
	}
}

// Whatever is stored, reading it ends, with an error or an explanation.
func FuzzUnpackBuild(f *testing.F) {
	for _, steps := range []int{0, 1, 200} {
		data, err := explained(steps).pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
		f.Add(data[:len(data)/2])
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := unpackBuild(data)
		if err != nil {
			return
		}
		if again, err := b.pack(); err != nil || len(again) == 0 {
			t.Errorf("what was read can't be stored: %v", err)
		}
	})
}
