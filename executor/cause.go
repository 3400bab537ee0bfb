package executor

import (
	"fmt"
	"strings"
)

// CauseKind is what made a process fail.
type CauseKind string

// Kinds of causes. A Cause without one is a process that says for itself why
// it failed.
const (
	CauseSignal        CauseKind = "signal"
	CauseOOM           CauseKind = "out of memory"
	CauseProcesses     CauseKind = "too many processes"
	CauseDiskFull      CauseKind = "disk full"
	CauseTimeout       CauseKind = "timeout"
	CauseNoProgram     CauseKind = "missing program"
	CauseNoInterpreter CauseKind = "missing interpreter"
	CauseArchitecture  CauseKind = "wrong architecture"
	CausePermission    CauseKind = "permission"
	CauseDNS           CauseKind = "name resolution"
	CausePolicy        CauseKind = "refused by policy"
)

// Cause says why a process failed, as far as that can be found out afterwards.
type Cause struct {
	Kind CauseKind
	// Text says what was tried, on what, why it failed, and the fix.
	Text string
	// Printed is what the process printed if Text is concluded from that
	// alone, and may be wrong; "" if it was found by looking.
	Printed string
}

func (c Cause) String() string {
	switch {
	case c.Kind == "":
		return ""
	case c.Printed != "":
		return fmt.Sprintf("%s, judging by what it printed (%q): %s", c.Kind, c.Printed, c.Text)
	}
	return fmt.Sprintf("%s: %s", c.Kind, c.Text)
}

// ExitError reports how a process ended.
type ExitError struct {
	Code  int
	Cause Cause
	Err   error // why it could not be executed, if it could not
}

func (e *ExitError) Error() string {
	parts := []string{fmt.Sprintf("exit code: %d", e.Code)}
	if e.Err != nil {
		parts = append(parts, e.Err.Error())
	}
	if cause := e.Cause.String(); cause != "" {
		parts = append(parts, cause)
	}
	return strings.Join(parts, ": ")
}

func (e *ExitError) Unwrap() error { return e.Err }
