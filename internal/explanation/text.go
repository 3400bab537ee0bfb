package explanation

import (
	"fmt"
	"io"
	"strings"
	"time"
	"unicode"
)

// MaxShown is how many reasons a sentence names, the first ones.
const MaxShown = 3

// Sentence says why the step ran: "ran because src/main.go changed".
func (s Step) Sentence() string {
	switch {
	case !s.Ran && s.Failed:
		return "failed before it could run"
	case !s.Ran:
		return "came from the cache"
	}
	if len(s.Causes) == 0 {
		return "ran for a reason that is not known"
	}
	parts := make([]string, 0, MaxShown)
	certain := false
	for _, c := range s.Causes[:min(len(s.Causes), MaxShown)] {
		parts = append(parts, c.String())
		certain = certain || c.Certain
	}
	if more := len(s.Causes) - MaxShown; more > 0 {
		parts = append(parts, fmt.Sprintf("%d more", more))
	}
	start := "ran because "
	if !certain {
		start = "ran, probably because "
	}
	return start + plain(list(parts))
}

// list is "a, b and c".
func list(parts []string) string {
	last := len(parts) - 1
	if last == 0 {
		return parts[0]
	}
	return strings.Join(parts[:last], ", ") + " and " + parts[last]
}

// plain is s on one line and without what terminals act on: names are foreign.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case unicode.IsSpace(r):
			return ' '
		case !unicode.IsPrint(r):
			return '?'
		}
		return r
	}, s)
}

// String is c as the end of a sentence that starts with because.
func (c Cause) String() string {
	switch c.Kind {
	case Always:
		return "files of the client are compared in every build"
	case NoCache:
		return c.Subject + " asks for it"
	case New:
		return "no earlier run of it is known" + in(": ", c.Subject)
	case Evicted:
		return fmt.Sprintf("its result was removed by %s at %s, nothing changed", c.Subject, c.Time.Local().Format(time.DateTime))
	case Gone:
		return "its earlier result is no longer in the cache, nothing changed"
	case Lost:
		return "its cached result could not be used" + in(": ", c.From)
	case Import:
		return "the imported cache " + c.Subject + " could not be used" + in(": ", c.From)
	case FailedBefore:
		return "it failed the last time, nothing changed since"
	case Parent:
		return c.Subject + " has a new result" + c.behind()
	case Order:
		return fmt.Sprintf("it now follows %s and followed %s before", c.Subject, c.From)
	case File:
		return fmt.Sprintf("%s %s%s", c.Subject, wasOr(c.To), c.behind())
	case Files:
		return "files" + in(" in ", c.Subject) + " that it reads changed" + c.behind()
	case Image:
		if c.Subject == "" {
			return fmt.Sprintf("the base image changed from %s to %s", c.From, c.To)
		}
		return fmt.Sprintf("the base image %s changed from %s to %s", c.Subject, shortDigest(c.From), shortDigest(c.To))
	case Env:
		return "the environment variable " + c.Subject + " " + c.change()
	case Argument:
		return "the build argument " + c.Subject + " " + c.change()
	case Command:
		return "its command changed" + in("; it was ", c.From) + c.behind()
	case Definition:
		if c.Subject == "" {
			return "its definition changed"
		}
		return "the " + c.Subject + " " + c.change() + c.behind()
	}
	return string(c.Kind)
}

// change says how the value changed, as far as it can be shown.
func (c Cause) change() string {
	switch {
	case c.From == "" && c.To == "":
		return "changed"
	case c.From == "":
		return "was added" + shown(": ", c.To)
	case c.To == "":
		return "was removed" + shown(": ", c.From)
	case c.From == Hidden || c.To == Hidden:
		return "changed"
	}
	return fmt.Sprintf("changed from %s to %s", c.From, c.To)
}

// Hidden stands for a value that is there but isn't shown.
const Hidden = "…"

func shown(before, value string) string {
	if value == Hidden {
		return ""
	}
	return before + value
}

func (c Cause) behind() string {
	if len(c.By) == 0 {
		return ""
	}
	root := c.Root()
	if !root.Certain {
		return " (probably because " + root.String() + ")"
	}
	return " (" + root.String() + ")"
}

func in(before, s string) string {
	if s == "" {
		return ""
	}
	return before + s
}

// wasOr makes "added" and "removed" passive.
func wasOr(how string) string {
	if how == "changed" {
		return how
	}
	return "was " + how
}

// shortDigest shows as much of a digest as tells it apart.
func shortDigest(d string) string {
	if algorithm, hex, ok := strings.Cut(d, ":"); ok && len(hex) > 12 {
		return algorithm + ":" + hex[:12]
	}
	return d
}

// transfers reports whether s brings the client's files, which every build does.
func (s Step) transfers() bool { return s.Ran && len(s.Causes) > 0 && s.Causes[0].Kind == Always }

// Write writes b as text: a block for each step that ran, then a summary. Steps
// that came from the cache, and those that bring the client's files, are shown
// with all. now is for telling how long ago something was.
func (b *Build) Write(w io.Writer, all bool, now time.Time) error {
	var out strings.Builder
	ran, failed, cached, transfers := 0, 0, 0, 0
	var took time.Duration
	compared := map[Earlier]int{}
	for _, s := range b.Steps {
		switch {
		case s.transfers():
			transfers++
		case s.Ran:
			ran++
			took += s.Duration
		case s.Failed:
			failed++
		default:
			cached++
		}
		if s.Compared != nil {
			compared[*s.Compared]++
		}
		if s.Ran && !s.transfers() || s.Failed || all {
			s.write(&out)
		}
	}
	fmt.Fprintf(&out, "Build %s ran %d of %s in %s; %s from the cache.\n", b.Ref, ran, steps(ran+failed+cached), round(took), came(cached))
	if transfers > 0 {
		fmt.Fprintf(&out, "Besides, %s brought files from the client, as in every build.\n", steps(transfers))
	}
	if b.Failed {
		out.WriteString("The build failed.\n")
	}
	for _, e := range mostCommon(compared) {
		fmt.Fprintf(&out, "Compared with build %s of %s ago.\n", e.Ref, ago(now.Sub(e.Time)))
	}
	_, err := io.WriteString(w, out.String())
	return err
}

func (s Step) write(w *strings.Builder) {
	w.WriteString(plain(s.Name))
	var about []string
	if s.Line != "" {
		about = append(about, plain(s.Line))
	}
	if s.Ran {
		about = append(about, round(s.Duration))
	}
	if s.Failed {
		about = append(about, "failed")
	}
	if len(about) > 0 {
		fmt.Fprintf(w, "  (%s)", strings.Join(about, ", "))
	}
	w.WriteString("\n  " + s.Sentence() + "\n\n")
}

func steps(n int) string {
	if n == 1 {
		return "1 step"
	}
	return fmt.Sprintf("%d steps", n)
}

func came(n int) string {
	if n == 1 {
		return "1 came"
	}
	return fmt.Sprintf("%d came", n)
}

// mostCommon is the build that most steps are compared with.
func mostCommon(count map[Earlier]int) (out []Earlier) {
	best := 0
	for e, n := range count {
		if e.Ref == "" {
			continue
		}
		if n > best || n == best && e.Time.After(out[0].Time) {
			best, out = n, []Earlier{e}
		}
	}
	return out
}

func round(d time.Duration) string {
	switch {
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	case d < time.Minute:
		return d.Round(100 * time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}

func ago(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}
