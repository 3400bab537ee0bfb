package executor

import (
	"io"
	"strings"
	"sync"
)

// tailSize is how much of the last output is remembered.
const tailSize = 2 << 10

// tail remembers the last of what passes through it.
type tail struct {
	mu   sync.Mutex // guards the fields below
	ring [tailSize]byte
	n    int // bytes written so far
}

func (t *tail) note(p []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(p) > tailSize {
		t.n += len(p) - tailSize
		p = p[len(p)-tailSize:]
	}
	for len(p) > 0 {
		m := copy(t.ring[t.n%tailSize:], p)
		t.n += m
		p = p[m:]
	}
}

// lines are the last ones that were printed, without empty ones, the last one
// at the end. One that began too long ago is cut.
func (t *tail) lines() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	text := string(t.ring[:min(t.n, tailSize)])
	if t.n > tailSize {
		text = string(t.ring[t.n%tailSize:]) + string(t.ring[:t.n%tailSize])
	}
	var out []string
	for line := range strings.SplitSeq(text, "\n") {
		if line = printable(line); line != "" {
			out = append(out, line)
		}
	}
	return out
}

// printable is what a terminal shows of a line in the end, without control
// characters.
func printable(line string) string {
	line = strings.TrimRight(line, "\r")
	line = line[strings.LastIndexByte(line, '\r')+1:]
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if r < ' ' && r != '\t' || r == 0x7f {
			return -1
		}
		return r
	}, strings.ToValidUTF8(line, "?")))
}

// noting is a writer that tells of what is written to it. It is used by pointer,
// so that any two can be compared.
type noting struct {
	io.Writer
	note func(p []byte)
}

func (w *noting) Write(p []byte) (int, error) {
	w.note(p)
	return w.Writer.Write(p)
}
