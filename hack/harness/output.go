package harness

import (
	"bytes"
	"fmt"
	"strings"
	"sync"
	"time"
)

// Output collects what a process writes. The zero value is ready to use, by
// several goroutines.
type Output struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

// Write implements io.Writer.
func (o *Output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

// String returns all that was written so far.
func (o *Output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// WaitFor waits, as long as patience, until text was written.
func (o *Output) WaitFor(patience time.Duration, text string) error {
	return WaitFor(patience, func() error {
		if got := o.String(); !strings.Contains(got, text) {
			return fmt.Errorf("no %q in %q", text, got)
		}
		return nil
	})
}
