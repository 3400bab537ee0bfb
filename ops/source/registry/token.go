package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
	remoteserrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/moby/buildkit/session"
	sessionauth "github.com/moby/buildkit/session/auth"
)

const (
	clientID          = "buildkit-client" // what clients and token servers know
	defaultExpiration = 60 * time.Second
)

// tokenKey is all that a token depends on.
type tokenKey struct {
	origin         origin
	realm, service string
	owner          string
	scopes         string
}

// token is a bearer token, or the place for one.
type token struct {
	turn    chan struct{} // held by whoever reads or fetches
	value   string
	expires time.Time
	used    time.Time // guarded by the client's mu
}

// tokenError: no token could be had.
type tokenError struct {
	server string
	err    error
}

func (e *tokenError) Error() string {
	text := plain(e.err)
	var status remoteserrors.ErrUnexpectedStatus
	if errors.As(e.err, &status) {
		text = (&statusError{Code: status.StatusCode, Message: serverMessage(strings.NewReader(string(status.Body)))}).Error()
	}
	return fmt.Sprintf("get token from %s: %s", e.server, text)
}

func (e *tokenError) Unwrap() error { return e.err }

// refused tells whether the token server doesn't accept the owner, so that
// another one may do better.
func (e *tokenError) refused() bool {
	var status remoteserrors.ErrUnexpectedStatus
	if errors.As(e.err, &status) {
		return status.StatusCode >= 400 && status.StatusCode < 500
	}
	return false
}

// token returns the bearer token for key, from the cache or through fetch.
// Callers with the same key wait for one another.
func (c *Client) token(ctx context.Context, key tokenKey, fetch func() (string, time.Time, error)) (string, error) {
	c.mu.Lock()
	t, ok := c.tokens[key]
	if !ok {
		c.forgetIdleLocked()
		t = &token{turn: make(chan struct{}, 1)}
		c.tokens[key] = t
	}
	t.used = time.Now()
	c.mu.Unlock()

	select {
	case t.turn <- struct{}{}:
		defer func() { <-t.turn }()
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
	if t.value != "" && time.Now().Before(t.expires) {
		return t.value, nil
	}
	value, expires, err := fetch()
	if err != nil {
		return "", err
	}
	t.value, t.expires = value, expires
	return value, nil
}

// forgetToken drops the cached token of key.
func (c *Client) forgetToken(key tokenKey) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.tokens, key)
}

// fetchToken gets a token for o: from its session, or from the token server.
func (c *Client) fetchToken(ctx context.Context, a Access, host string, ch challenge, o *owner, s scopes) (string, time.Time, error) {
	server := ch.realm
	if u, err := url.Parse(ch.realm); err == nil {
		server = u.Host
	}
	if o.fetches {
		resp, err := sessionauth.FetchToken(ctx, &sessionauth.FetchTokenRequest{
			ClientID: clientID, Host: host, Realm: ch.realm, Service: ch.service, Scopes: s.list(),
		}, a.Sessions, session.NewGroup(o.session))
		if err != nil {
			return "", time.Time{}, &tokenError{server, err}
		}
		var issued time.Time
		if resp.IssuedAt != 0 {
			issued = time.Unix(resp.IssuedAt, 0)
		}
		return resp.Token, expiry(issued, resp.ExpiresIn), nil
	}
	client, err := c.tokenClient(host, server, a.Insecure)
	if err != nil {
		return "", time.Time{}, &tokenError{server, err}
	}
	value, expires, err := c.requestToken(ctx, client, auth.TokenOptions{
		Realm: ch.realm, Service: ch.service, Scopes: s.list(),
		Username: o.username, Secret: o.secret,
	})
	if err != nil {
		return "", time.Time{}, &tokenError{server, err}
	}
	return value, expires, nil
}

// requestToken asks a token server. GET is what all of them know, except that
// an identity token can only be exchanged by POST.
func (c *Client) requestToken(ctx context.Context, client *http.Client, to auth.TokenOptions) (string, time.Time, error) {
	if to.Secret == "" || to.Username != "" {
		resp, err := auth.FetchToken(ctx, client, c.header, to)
		if err == nil {
			return resp.Token, expiry(resp.IssuedAt, int64(resp.ExpiresInSeconds)), nil
		}
		var status remoteserrors.ErrUnexpectedStatus
		if to.Secret == "" || !errors.As(err, &status) || !postInstead(status.StatusCode) {
			return "", time.Time{}, err
		}
	}
	resp, err := auth.FetchTokenWithOAuth(ctx, client, c.header, clientID, to)
	if err != nil {
		return "", time.Time{}, err
	}
	return resp.AccessToken, expiry(resp.IssuedAt, int64(resp.ExpiresInSeconds)), nil
}

func postInstead(code int) bool {
	return code == http.StatusMethodNotAllowed || code == http.StatusNotFound || code == http.StatusUnauthorized
}

// tokenClient is the client for a token server: configured by a section of its
// own or else like the registry that named it.
func (c *Client) tokenClient(host, server string, insecure bool) (*http.Client, error) {
	name := server
	cfg, ok := c.cfg.Hosts[server]
	if !ok {
		name, cfg = host, c.cfg.Hosts[host]
		if host == dockerHubEndpoint {
			cfg = c.cfg.Hosts[dockerHub]
		}
	}
	e, err := c.endpoint(clientKey{host: name, insecure: insecure}, cfg)
	if err != nil {
		return nil, err
	}
	return e.client, nil
}

// expiry leaves a tenth of a token's life for requests under way.
func expiry(issued time.Time, seconds int64) time.Time {
	life := time.Duration(seconds) * time.Second
	if seconds <= 0 {
		life = defaultExpiration
	}
	now := time.Now()
	if issued.IsZero() || issued.After(now) {
		issued = now
	}
	return issued.Add(life * 9 / 10)
}
