package http

import (
	"context"
	"errors"
	"fmt"
	"io"
	stdhttp "net/http"
	"strings"

	"github.com/kilnbuild/kiln/internal/version"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/secrets"
	"github.com/moby/buildkit/session/upload"
)

const (
	// headerSecret and tokenSecret, with the host behind, name the secrets that are
	// looked for if the op names none.
	headerSecret = "HTTP_AUTH_HEADER_"
	tokenSecret  = "HTTP_AUTH_TOKEN_"
	// maxRedirects bounds how often a server may send us elsewhere.
	maxRedirects = 10
	// sessionHost stands for the client, which serves what it uploads (SES-072).
	sessionHost = "buildkit-session"
)

// request is a GET with the headers that the op and the client's secrets ask for.
func (i *instance) request(ctx context.Context, g session.Group) (*stdhttp.Request, error) {
	req, err := stdhttp.NewRequestWithContext(ctx, stdhttp.MethodGet, i.spec.url.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", i.spec.shown, withoutURL(err))
	}
	req.Header.Set("User-Agent", "kiln/"+version.Kiln)
	for _, h := range i.spec.headers {
		req.Header.Set(h.Name, h.Value)
	}
	if i.spec.url.Host == sessionHost {
		return req, nil
	}
	auth, err := i.authorization(ctx, g)
	if err != nil {
		return nil, err
	}
	if strings.ContainsAny(auth, "\r\n") {
		return nil, fmt.Errorf("the secret for %s has more than one line and can't be a header", i.spec.shown)
	}
	if auth != "" {
		req.Header.Set("Authorization", auth)
	}
	return req, nil
}

// authorization is the header that the client's secrets say; "" is none. One
// that the op names must be there (LLB-113).
func (i *instance) authorization(ctx context.Context, g session.Group) (string, error) {
	if name := i.spec.secret; name != "" {
		v, err := i.secret(ctx, g, name)
		if err != nil {
			return "", fmt.Errorf("failed to retrieve HTTP auth secret %s: %w", name, err)
		}
		return v, nil
	}
	host := i.spec.url.Hostname()
	for _, s := range []struct{ name, prefix string }{{tokenSecret + host, "Bearer "}, {headerSecret + host, ""}} {
		v, err := i.secret(ctx, g, s.name)
		switch {
		case err == nil:
			return s.prefix + v, nil
		case !errors.Is(err, secrets.ErrNotFound) && !errors.Is(err, session.ErrNoActiveSessions):
			return "", fmt.Errorf("get secret %s: %w", s.name, err)
		}
	}
	return "", nil
}

func (i *instance) secret(ctx context.Context, g session.Group, name string) (value string, err error) {
	if g == nil {
		return "", session.ErrNoActiveSessions
	}
	err = i.opts.Sessions.Any(ctx, g, func(ctx context.Context, _ string, caller session.Caller) error {
		data, err := secrets.GetSecret(ctx, caller, name)
		value = strings.TrimSuffix(string(data), "\n")
		return err
	})
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return value, err
}

// client follows redirects, without the credentials once another host is asked,
// or the same one without encryption.
func (i *instance) client(g session.Group) *stdhttp.Client {
	var rt stdhttp.RoundTripper = stdhttp.DefaultTransport
	if i.spec.url.Host == sessionHost {
		rt = &uploads{i: i, g: g}
	}
	return &stdhttp.Client{Transport: rt, CheckRedirect: func(req *stdhttp.Request, via []*stdhttp.Request) error {
		if len(via) >= maxRedirects {
			return fmt.Errorf("stopped after %d redirects", maxRedirects)
		}
		first := via[0].URL
		if req.URL.Host == sessionHost {
			return errors.New("it redirects to the client's own files")
		}
		if req.URL.Host != first.Host || req.URL.Scheme != first.Scheme && req.URL.Scheme != "https" {
			req.Header.Del("Authorization")
		}
		return nil
	}}
}

// uploads answers with what a client uploads.
type uploads struct {
	i *instance
	g session.Group
}

func (u *uploads) RoundTrip(req *stdhttp.Request) (*stdhttp.Response, error) {
	var up *upload.Upload
	ctx := req.Context()
	err := u.i.opts.Sessions.Any(ctx, u.g, func(_ context.Context, _ string, caller session.Caller) (err error) {
		up, err = upload.New(ctx, caller, req.URL) // it lasts longer than this call
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("ask the client for its upload: %w", err)
	}
	pr, pw := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, err := up.WriteTo(pw)
		pw.CloseWithError(err)
	}()
	return &stdhttp.Response{
		Status: "200 OK", StatusCode: stdhttp.StatusOK, Header: stdhttp.Header{}, Request: req,
		Body: &uploaded{pr, done}, ContentLength: -1,
	}, nil
}

// uploaded is the body; closing it waits for the copying to end.
type uploaded struct {
	*io.PipeReader
	done chan struct{}
}

// Close implements io.Closer.
func (u *uploaded) Close() error {
	err := u.PipeReader.Close()
	<-u.done
	return err
}
