// Package explanation says in data and in words why the steps of a build ran.
// The daemon makes explanations and keeps them; clients show them. Their JSON
// is what travels between the two and what buildctl explain --json prints.
package explanation

import (
	"time"
)

// Build explains one build.
type Build struct {
	Ref     string    `json:"ref"`
	Started time.Time `json:"started"`
	Ended   time.Time `json:"ended"`
	// Failed is set if the build didn't succeed.
	Failed bool `json:"failed,omitempty"`
	// Steps are in the order of the graph, inputs first: those that ran and
	// those that were answered from the cache. What wasn't needed is left out.
	Steps []Step `json:"steps"`
}

// Step is one vertex.
type Step struct {
	Name string `json:"name"`
	// Line is where it stands in the source, such as Dockerfile:4; "" if that
	// isn't known.
	Line     string        `json:"line,omitempty"`
	Ran      bool          `json:"ran"`
	Failed   bool          `json:"failed,omitempty"`   // or was interrupted
	Duration time.Duration `json:"duration,omitempty"` // in nanoseconds
	// Causes say why it ran, the most telling one first; empty for a step that
	// didn't.
	Causes []Cause `json:"causes,omitempty"`
	// Compared is the build in which the step ran that this one is compared
	// with; nil if there is none.
	Compared *Earlier `json:"compared,omitempty"`
}

// Earlier is a build that a step ran in before.
type Earlier struct {
	Ref  string    `json:"ref,omitempty"` // "" if its record is gone
	Time time.Time `json:"time"`
}

// Kind is what sort of reason a Cause is.
type Kind string

const (
	// Always: the step isn't cached by what it is, but by what it brings.
	Always Kind = "always"
	// NoCache: the client asked for it. Subject is the flag or the attribute.
	NoCache Kind = "no-cache"
	// New: no earlier run of the step is known. Subject says why, where that isn't
	// because there was none.
	New Kind = "new"
	// Evicted: nothing changed, but the result was removed. Subject is the
	// rule that removed it, Time says when.
	Evicted Kind = "evicted"
	// Gone: nothing changed, but the result isn't in the cache any more.
	Gone Kind = "gone"
	// Lost: a result was found but couldn't be had. From says why.
	Lost Kind = "lost"
	// Import: the cache that the build imports, Subject, could not be used, From
	// says why: it may have had the result. It is never certain.
	Import Kind = "import"
	// FailedBefore: nothing changed since the step failed.
	FailedBefore Kind = "failed-before"
	// Parent: another step, Subject, has a different result; By says why.
	Parent Kind = "parent"
	// Order: the step follows To now and followed From before.
	Order Kind = "order"
	// File: a file that the step reads differs. Subject is its path, To is
	// changed, added or removed.
	File Kind = "file"
	// Files: files that the step reads differ that aren't known by name.
	// Subject is a directory they are in, if that is known.
	Files Kind = "files"
	// Image: what a base image's name, Subject, stands for changed from the
	// digest From to To; without a Subject, the name did.
	Image Kind = "image"
	// Env is an environment variable, Argument a build argument of that name.
	Env      Kind = "env"
	Argument Kind = "argument"
	// Command: what the step runs. From is the step's name before, if it tells.
	Command Kind = "command"
	// Definition: another part of the step's definition, Subject, changed from
	// From to To, where these can be shown; without Subject it is not known
	// which.
	Definition Kind = "definition"
)

// Cause is one reason why a step ran.
type Cause struct {
	Kind    Kind      `json:"kind"`
	Subject string    `json:"subject,omitempty"`
	From    string    `json:"from,omitempty"`
	To      string    `json:"to,omitempty"`
	Time    time.Time `json:"time,omitzero"`
	// Certain is set if the cause is proven: both runs were compared and this
	// differs. Otherwise it is probable.
	Certain bool `json:"certain"`
	// By is the reason behind the reason.
	By []Cause `json:"by,omitempty"`
}

// Root is the reason behind c that has none behind it.
func (c Cause) Root() Cause {
	for len(c.By) > 0 {
		c = c.By[0]
	}
	return c
}
