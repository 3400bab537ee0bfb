package dockerfile

import (
	"fmt"
	"math"
	"strings"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/frontend/dockerfile/shell"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// vertexName names the next step of the stage: "[stage 2/5] RUN make".
func (s *stage) vertexName(text string, platform *ocispec.Platform, env shell.EnvGetter) string {
	if s.stepsTotal == 0 {
		return text
	}
	s.steps++
	return s.stepName(text, platform, env)
}

// stepName is the name of the present step.
func (s *stage) stepName(text string, platform *ocispec.Platform, env shell.EnvGetter) string {
	if s.stepsTotal == 0 {
		return text
	}
	var b strings.Builder
	b.WriteByte('[')
	if s.showPlatform && platform != nil {
		b.WriteString(platforms.FormatAll(*platform) + crossTarget(*platform, env) + " ")
	}
	if s.name != "" {
		b.WriteString(s.name + " ")
	}
	width := int(1 + math.Log10(float64(s.stepsTotal)))
	fmt.Fprintf(&b, "%*d/%d] ", width, s.steps, s.stepsTotal)
	if s.inTrigger {
		b.WriteString("ONBUILD ")
	}
	return b.String() + text
}

// crossTarget is what a step on platform p builds for, if the environment names
// another platform: "->arm64".
func crossTarget(p ocispec.Platform, env shell.EnvGetter) string {
	target, ok := targetFromEnv(env)
	if !ok {
		return ""
	}
	if target.OS == "" {
		target.OS = p.OS
	}
	if target.Architecture == "" {
		target.Architecture = p.Architecture
	}
	target = normalize(target)
	switch {
	case target.OS != p.OS:
		return "->" + platforms.FormatAll(target)
	case target.Architecture == p.Architecture:
		return ""
	case target.Variant != "":
		return "->" + target.Architecture + "/" + target.Variant
	}
	return "->" + target.Architecture
}

func targetFromEnv(env shell.EnvGetter) (p ocispec.Platform, ok bool) {
	for _, key := range env.Keys() {
		v, _ := env.Get(key)
		switch key {
		case "TARGETPLATFORM":
			if p, err := platforms.Parse(v); err == nil {
				return p, true
			}
		case "TARGETOS":
			p.OS, ok = v, true
		case "TARGETARCH":
			p.Architecture, ok = v, true
		case "TARGETVARIANT":
			p.Variant, ok = v, true
		}
	}
	return p, ok
}

// displayName is an instruction as vertex names show it: its name in capitals,
// variables replaced.
func displayName(text string, lex *shell.Lex, env shell.EnvGetter) string {
	if expanded, err := expandWord(lex, text, env); err == nil {
		text = expanded.Result
	}
	name, rest, ok := strings.Cut(text, " ")
	if !ok {
		return strings.ToUpper(text)
	}
	return strings.ToUpper(name) + " " + rest
}

// documentSummary is the first line of an inline document.
func documentSummary(doc string) string {
	first, _, more := strings.Cut(strings.ReplaceAll(strings.TrimSpace(doc), "\r\n", "\n"), "\n")
	if more {
		first += "..."
	}
	return first
}
