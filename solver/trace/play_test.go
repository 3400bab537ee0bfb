package trace_test

import (
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/solver/trace"
)

// What can't be played is refused with its line, and never panics.
func TestPlayRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"request 1 A":                                        `line 1, request 1 A: there is no vertex "A"`,
		"vertex A\nrequest one A":                            `line 2, request one A: "one" is no number`,
		"vertex A\nrequest 1":                                "line 2, request 1: a word is missing",
		"vertex A\nboil A":                                   `line 2, boil A: "boil" is no event`,
		"vertex A\nvertex B inputs=A,C":                      `there is no vertex "C"`,
		"vertex A name=unquoted":                             "what follows name= must be quoted",
		"vertex A\ncachemap A op=a":                          `"cachemap A" was not started`,
		"vertex A\nrequest 1 A\ncachemap A op=a\ncachemap A": `line 4, cachemap A: "cachemap A" was not started`,
		"vertex A\nrequest 1 A\ncachemap A op=a\nload A r1":  `"load A r1" was not started`,
		"vertex A\nrequest 1 A\ncachemap A op=a\nlookup A\nexecute A outputs=r1": `output "r1" isn't of the form index:result`,
		"digest": `"digest" was not started`,
	} {
		if played, err := trace.Play(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %q, error %v; want %s", text, played, err, want)
		}
	}
}

// A recording may end anywhere: what the core has is given back.
func TestPlayEndsAnywhere(t *testing.T) {
	const text = "vertex A\nvertex B inputs=A\n\nrequest 1 B\n----\n\ncachemap A op=a\ncachemap B op=b deps=+content\n----\n\nlookup A keys=k records=r1\nlookup B\nload A r1\ndigest B 0 content=c\n----\n"
	lines := strings.SplitAfter(text, "\n")
	for n := range lines {
		played, err := trace.Play(strings.Join(lines[:n], ""))
		if err != nil {
			t.Errorf("the first %d lines: %v", n, err)
		}
		if n == len(lines)-1 && !strings.Contains(played, "start digest B 0 of r1") {
			t.Errorf("played:\n%s", played)
		}
	}
}

func FuzzPlay(f *testing.F) {
	f.Add("vertex A\nvertex B inputs=A/1\n\nrequest 1 B\ncachemap A op=a\ncachemap B op=b deps=+content@x\nlookup A/1 keys=k records=import1:r1\nload A/1 import1:r1 result=r2\ndigest B 0 content=c\n----\n")
	f.Fuzz(func(t *testing.T, text string) {
		if played, err := trace.Play(text); err == nil {
			if _, err := trace.Play(played); err != nil {
				t.Errorf("played once but not twice: %v\n%s", err, played)
			}
		}
	})
}
