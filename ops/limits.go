package ops

import (
	"fmt"
	"strings"
	"time"
)

// Limits are how long things may take; 0 is no limit. No part of a cache key.
type Limits struct {
	Step  time.Duration // the run of a step
	Quiet time.Duration // a step that prints nothing
	Build time.Duration // a build, from its request to its end
}

// limitOptions are the options that set limits, of builds and in descriptions of
// ops. Clients such as docker's pass on build arguments only.
var limitOptions = []struct {
	name, arg string
	field     func(*Limits) *time.Duration
}{
	{"kiln.step-timeout", "build-arg:KILN_STEP_TIMEOUT", func(l *Limits) *time.Duration { return &l.Step }},
	{"kiln.no-output-timeout", "build-arg:KILN_NO_OUTPUT_TIMEOUT", func(l *Limits) *time.Duration { return &l.Quiet }},
	{"kiln.build-timeout", "build-arg:KILN_BUILD_TIMEOUT", func(l *Limits) *time.Duration { return &l.Build }},
}

// With is l with what opts set. 0 lifts a limit.
func (l Limits) With(opts map[string]string) (Limits, error) {
	for _, o := range limitOptions {
		for _, name := range []string{o.arg, o.name} {
			text, ok := opts[name]
			if !ok || text == "" {
				continue
			}
			d, err := time.ParseDuration(text)
			if err != nil || d < 0 {
				return l, fmt.Errorf("option %s is %q: it must be a duration such as 10m or 1h30m, or 0 for no limit", strings.TrimPrefix(name, "build-arg:"), text)
			}
			*o.field(&l) = d
		}
	}
	return l, nil
}
