package registry

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"syscall"
	"time"
)

const (
	attemptsLast   = 5 // when no other host can answer
	attemptsMirror = 2
	firstDelay     = 250 * time.Millisecond
	maxDelay       = 30 * time.Second
	// patience is how long a request may take to fail and still be sent again:
	// who is silent for so long isn't overloaded for a moment.
	patience = 20 * time.Second
)

// retrier tries a request again, with growing delays, when the registry was
// overloaded, failed inside or cut the connection. Requests whose body can't
// be sent twice are passed through: Resolver.Push repeats those.
type retrier struct {
	base     http.RoundTripper
	host     string
	attempts int
	delay    time.Duration
}

// RoundTrip implements http.RoundTripper.
func (r *retrier) RoundTrip(req *http.Request) (*http.Response, error) {
	delay := r.delay
	for n := 1; ; n++ {
		sent := time.Now()
		resp, err := r.base.RoundTrip(req)
		if !transient(resp, err) || !repeatable(req) || err != nil && time.Since(sent) > patience {
			if err != nil {
				err = &transportError{host: r.host, attempts: n, err: err}
			}
			return resp, err
		}
		if n == r.attempts {
			return nil, r.exhausted(resp, err, n)
		}
		wait := delay + rand.N(delay/2+1)
		if after, ok := retryAfter(resp); ok {
			wait = min(after, maxDelay)
		}
		delay *= 2
		if resp != nil {
			discard(resp.Body)
		}
		if err := pause(req, wait); err != nil {
			return nil, err
		}
		if req.GetBody != nil {
			body, err := req.GetBody()
			if err != nil {
				return nil, fmt.Errorf("rewind request body: %w", err)
			}
			req = req.Clone(req.Context())
			req.Body = body
		}
	}
}

func (r *retrier) exhausted(resp *http.Response, err error, n int) error {
	if resp == nil {
		return &transportError{host: r.host, attempts: n, err: err}
	}
	defer discard(resp.Body)
	return &transportError{host: r.host, attempts: n, err: &statusError{
		Code: resp.StatusCode, Message: serverMessage(resp.Body),
	}}
}

func pause(req *http.Request, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-req.Context().Done():
		return req.Context().Err()
	}
}

// repeatable tells whether req may be sent again: it has no body, or is the
// form of a token request.
func repeatable(req *http.Request) bool {
	return req.Body == nil || req.Body == http.NoBody || req.Method == http.MethodPost && req.GetBody != nil
}

func transient(resp *http.Response, err error) bool {
	if err != nil {
		return transientError(err)
	}
	switch resp.StatusCode {
	case http.StatusRequestTimeout, http.StatusTooManyRequests, http.StatusInternalServerError,
		http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	return false
}

// transientError tells whether the network may behave another time.
func transientError(err error) bool {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return true
	}
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

func retryAfter(resp *http.Response) (time.Duration, bool) {
	if resp == nil {
		return 0, false
	}
	v := resp.Header.Get("Retry-After")
	if s, err := strconv.Atoi(v); err == nil && s >= 0 && s < 1<<30 {
		return time.Duration(s) * time.Second, true
	}
	if t, err := http.ParseTime(v); err == nil {
		return max(0, time.Until(t)), true
	}
	return 0, false
}

// discard reads a little of what is left, so that the connection can be used
// again, and closes it.
func discard(body io.ReadCloser) {
	io.CopyN(io.Discard, body, 64<<10) // a failure only costs the connection
	body.Close()
}
