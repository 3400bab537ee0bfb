package registry

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteserrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
)

// transportError: a host could not be talked to.
type transportError struct {
	host     string
	attempts int
	err      error
}

func (e *transportError) Error() string {
	var tries string
	if e.attempts > 1 {
		tries = fmt.Sprintf(" (tried %d times)", e.attempts)
	}
	return fmt.Sprintf("registry %s: %s%s", e.host, e.cause(), tries)
}

// Unwrap hides what containerd's resolver would take as a reason for retries
// of its own: enough of them were made.
func (e *transportError) Unwrap() error {
	if errors.Is(e.err, io.EOF) || errors.Is(e.err, io.ErrUnexpectedEOF) {
		return nil
	}
	return e.err
}

// cause says what went wrong and what would help.
func (e *transportError) cause() string {
	section := fmt.Sprintf("[registry.%q]", e.host)
	var (
		record    tls.RecordHeaderError
		authority x509.UnknownAuthorityError
		verify    *tls.CertificateVerificationError
		dns       *net.DNSError
	)
	switch {
	case errors.Is(e.err, syscall.ECONNREFUSED):
		return "connection refused; is it running?"
	case errors.As(e.err, &record) && string(record.RecordHeader[:]) == "HTTP/",
		strings.Contains(e.err.Error(), "server gave HTTP response to HTTPS client"):
		return "it speaks HTTP without TLS; set http = true in " + section + " if that is intended"
	case errors.Is(e.err, errWantsTLS):
		return "it speaks HTTPS; remove http = true from " + section
	case errors.As(e.err, &authority):
		return "its certificate is signed by an unknown authority; name the CA with ca = [...] in " + section
	case errors.As(e.err, &verify):
		return "its certificate isn't valid: " + plain(verify.Err)
	case errors.As(e.err, &dns) && dns.IsNotFound:
		return "no such host"
	case errors.Is(e.err, io.EOF), errors.Is(e.err, io.ErrUnexpectedEOF), errors.Is(e.err, syscall.ECONNRESET):
		return "it closed the connection"
	}
	return plain(e.err)
}

// statusError: a request was answered with an error.
type statusError struct {
	Code    int
	Message string // "" if the registry gave none
}

func (e *statusError) Error() string {
	text := fmt.Sprintf("%d %s", e.Code, http.StatusText(e.Code))
	if e.Message != "" {
		text += ": " + e.Message
	}
	return text
}

// deniedError: a registry doesn't give what is asked for to anybody in the
// group.
type deniedError struct {
	host  string
	known bool // the client has credentials
}

func (e *deniedError) Error() string {
	if e.known {
		return "the client's credentials for " + e.host + " are refused, or don't give access; log in again"
	}
	return "the repository doesn't exist or needs credentials; the client has none for " + e.host
}

func (e *deniedError) Unwrap() error { return docker.ErrInvalidAuthorization }

// failure tells an error in words for users. What it wraps stays reachable for
// errors.Is and errors.As, but isn't part of the text: it may name URLs that
// are signed.
type failure struct {
	text string
	err  error
}

func (f *failure) Error() string { return f.text }
func (f *failure) Unwrap() error { return f.err }

// describe says what failed: act is what was tried, such as "resolve", on ref.
func describe(act, ref string, err error) error {
	if err == nil {
		return nil
	}
	var (
		done      *failure
		transport *transportError
		status    remoteserrors.ErrUnexpectedStatus
		token     *tokenError
		denied    *deniedError
	)
	switch {
	case errors.As(err, &done):
		return err
	case errors.As(err, &token):
		return &failure{fmt.Sprintf("%s %s: %s", act, ref, token), err}
	case errors.As(err, &transport):
		return &failure{fmt.Sprintf("%s %s: %s", act, ref, transport), err}
	case errors.As(err, &denied):
		return &failure{fmt.Sprintf("%s %s: access denied: %s", act, ref, denied), err}
	case errors.Is(err, docker.ErrInvalidAuthorization):
		return &failure{fmt.Sprintf("%s %s: access denied: the repository doesn't exist or needs credentials", act, ref), err}
	case errors.As(err, &status):
		e := &statusError{Code: status.StatusCode, Message: serverMessage(strings.NewReader(string(status.Body)))}
		if e.Code == http.StatusUnauthorized || e.Code == http.StatusForbidden {
			return &failure{fmt.Sprintf("%s %s: access denied: %s", act, ref, e), err}
		}
		return &failure{fmt.Sprintf("%s %s: the registry answered %s", act, ref, e), err}
	case errdefs.IsNotFound(err):
		return &failure{fmt.Sprintf("%s %s: not found", act, ref), err}
	}
	return &failure{fmt.Sprintf("%s %s: %s", act, ref, plain(err)), err}
}

var queries = regexp.MustCompile(`\?[^\s"]+`)

// plain is err's text without the query parts of URLs: those may be signed.
func plain(err error) string { return queries.ReplaceAllString(err.Error(), "") }

// serverMessage extracts what a registry or token server says in an error
// body, "" if it is nothing legible.
func serverMessage(body io.Reader) string {
	var parsed struct {
		Errors  []struct{ Code, Message string }
		Details string
	}
	raw, err := io.ReadAll(io.LimitReader(body, 64<<10))
	if err != nil || json.Unmarshal(raw, &parsed) != nil {
		return ""
	}
	var parts []string
	for _, e := range parsed.Errors {
		if text := strings.TrimSpace(e.Message); text != "" {
			parts = append(parts, text)
		} else if e.Code != "" {
			parts = append(parts, e.Code)
		}
	}
	if len(parts) == 0 && parsed.Details != "" {
		parts = []string{parsed.Details}
	}
	text := strings.Join(parts, "; ")
	if len(text) > 300 {
		text = text[:300] + "..."
	}
	return text
}
