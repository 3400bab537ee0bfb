package build

import (
	"context"
	"strconv"
)

// explainOpts are the options of a request, whoever's frontend it is for, by
// which the log of each step begins with the reason why it runs. Clients such as
// docker's pass on build arguments only.
var explainOpts = []string{"kiln.explain", "build-arg:KILN_EXPLAIN"}

// explainTo does as opts say. What isn't a truth value isn't meant for us.
func (b *Build) explainTo(opts map[string]string) {
	for _, name := range explainOpts {
		if on, err := strconv.ParseBool(opts[name]); err == nil && on && b.explain != nil {
			b.explain.Show()
		}
	}
}

// clientKey is what the client says tells its directories apart (SES-040), ""
// if it says nothing; ok is false as long as its session isn't there.
func (b *Build) clientKey() (key string, ok bool) {
	if b.req.Session == "" {
		return "", true
	}
	c, err := b.engine.cfg.Worker.Sessions().Get(context.Background(), b.req.Session, true)
	if err != nil || c == nil {
		return "", false
	}
	return c.SharedKey(), true
}
