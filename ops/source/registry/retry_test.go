package registry

import (
	"errors"
	"net/http"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// silent fails each request after a time, as a connection does.
type silent struct {
	after time.Duration
	asked int
}

func (s *silent) RoundTrip(req *http.Request) (*http.Response, error) {
	s.asked++
	select {
	case <-time.After(s.after):
		return nil, os.ErrDeadlineExceeded
	case <-req.Context().Done():
		return nil, req.Context().Err()
	}
}

// Who fails at once is asked again; who is silent for minutes is not, so that a
// build waits for those minutes once.
func TestSilenceIsNotRepeated(t *testing.T) {
	for after, asked := range map[time.Duration]int{time.Second: attemptsLast, 2 * time.Minute: 1} {
		synctest.Test(t, func(t *testing.T) {
			base := &silent{after: after}
			r := &retrier{base: base, host: "r.example", attempts: attemptsLast, delay: firstDelay}
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://r.example/v2/", nil)
			if err != nil {
				t.Fatal(err)
			}
			_, err = r.RoundTrip(req)
			if !errors.Is(err, os.ErrDeadlineExceeded) || !strings.Contains(err.Error(), "registry r.example: ") || base.asked != asked {
				t.Errorf("silent for %s: asked %d times, want %d: %v", after, base.asked, asked, err)
			}
		})
	}
}
