package dockerfile

import (
	"fmt"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/frontend"
)

// FuzzDockerfile shows that no bytes make the frontend panic, and that what it
// accepts once it accepts again with the same outcome.
func FuzzDockerfile(f *testing.F) {
	for _, c := range loadCases(f) {
		f.Add([]byte(c.files["Dockerfile"]), c.files[".dockerignore"], c.opts["platform"])
	}
	f.Fuzz(func(t *testing.T, dockerfile []byte, ignore, platform string) {
		files := map[string]string{"Dockerfile": string(dockerfile), ".dockerignore": ignore}
		req := frontend.Request{SessionID: "session", Opts: map[string]string{"platform": platform, "cmdline": "x"}}
		if strings.Count(platform, ",") > 3 {
			return // many platforms only take longer
		}
		res, err := Frontend{}.Solve(t.Context(), newBridge(t, files), req)
		again, err2 := Frontend{}.Solve(t.Context(), newBridge(t, files), req)
		if (err == nil) != (err2 == nil) {
			t.Fatalf("first %v, then %v", err, err2)
		}
		if err == nil && fmt.Sprintf("%q", res.Metadata) != fmt.Sprintf("%q", again.Metadata) {
			t.Fatalf("first %q, then %q", res.Metadata, again.Metadata)
		}
	})
}

// BenchmarkDockerfile converts a Dockerfile of mixed steps.
func BenchmarkDockerfile(b *testing.B) {
	for _, steps := range []int{20, 200, 2000} {
		var text strings.Builder
		text.WriteString("FROM busybox\n")
		for i := range steps {
			switch i % 4 {
			case 0:
				fmt.Fprintf(&text, "RUN make step%d\n", i)
			case 1:
				fmt.Fprintf(&text, "COPY file%d /dir%d/\n", i, i)
			case 2:
				fmt.Fprintf(&text, "ENV VAR%d=value$VAR%d\n", i, i-4)
			case 3:
				fmt.Fprintf(&text, "WORKDIR /work%d\n", i)
			}
		}
		b.Run(fmt.Sprint(steps), func(b *testing.B) {
			bridge := newBridge(b, map[string]string{"Dockerfile": text.String()})
			for b.Loop() {
				if _, err := (Frontend{}).Solve(b.Context(), bridge, frontend.Request{SessionID: "s"}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
