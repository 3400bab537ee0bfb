package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
)

// origin is whom a challenge came from. What is learned without verified
// certificates isn't used otherwise.
type origin struct {
	host     string
	insecure bool
}

// challenge is how a registry wants requests to be authorized.
type challenge struct {
	scheme         auth.AuthenticationScheme
	realm, service string // of a token server
}

// authorizer answers challenges on behalf of a group of sessions. The first
// session that has an answer is used; one whose answer is refused is passed
// over from then on.
type authorizer struct {
	c *Client
	a Access

	mu      sync.Mutex // guards the fields below; never held across I/O
	extra   map[origin]scopes
	refused map[refusal]bool
	shown   map[string]bool // owners whose credentials or tokens were sent
}

// refusal: a registry doesn't give a session's owner what is asked for.
type refusal struct {
	ownerKey
	scopes string
}

var _ docker.Authorizer = (*authorizer)(nil)

func newAuthorizer(c *Client, a Access) *authorizer {
	return &authorizer{c: c, a: a, extra: map[origin]scopes{}, refused: map[refusal]bool{}, shown: map[string]bool{}}
}

func (z *authorizer) origin(req *http.Request) origin {
	return origin{req.URL.Host, z.a.Insecure}
}

// Authorize sets the Authorization header of req if its registry is known to
// want one.
func (z *authorizer) Authorize(ctx context.Context, req *http.Request) error {
	from := z.origin(req)
	z.c.mu.Lock()
	ch, ok := z.c.challenges[from]
	z.c.mu.Unlock()
	if !ok {
		return nil
	}
	for {
		o, err := z.owner(ctx, from)
		if err != nil {
			return err
		}
		if ch.scheme == auth.BasicAuth {
			if o.secret != "" {
				z.show(o, from)
				req.SetBasicAuth(o.username, o.secret)
			}
			return nil
		}
		key, s := z.tokenKey(ctx, from, ch, o)
		value, err := z.c.token(ctx, key, func() (string, time.Time, error) {
			return z.c.fetchToken(ctx, z.a, from.host, ch, o, s)
		})
		var te *tokenError
		if errors.As(err, &te) && te.refused() && z.refuse(ctx, from, o) {
			continue
		}
		if err != nil {
			return err
		}
		z.show(o, from)
		req.Header.Set("Authorization", "Bearer "+value)
		return nil
	}
}

func (z *authorizer) show(o *owner, to origin) {
	if o == nobody {
		return
	}
	z.mu.Lock()
	defer z.mu.Unlock()
	z.shown[o.at(to.host)] = true
}

// AddResponses learns from an unauthorized response. An error ends the
// request, nil means that it is worth another try.
func (z *authorizer) AddResponses(ctx context.Context, responses []*http.Response) error {
	last := responses[len(responses)-1]
	from := z.origin(last.Request)
	ch, answer, ok := choose(auth.ParseAuthHeader(last.Header))
	if !ok {
		return fmt.Errorf("registry %s demands an unknown kind of authorization: %w", from.host, docker.ErrInvalidAuthorization)
	}
	z.c.mu.Lock()
	known, before := z.c.challenges[from]
	z.c.challenges[from] = ch
	z.c.mu.Unlock()

	o, err := z.owner(ctx, from)
	if err != nil {
		return err
	}
	if last.Request.Header.Get("Authorization") == "" {
		if ch.scheme == auth.BasicAuth && o.secret == "" {
			return &deniedError{host: from.host}
		}
		z.widen(ctx, from, answer["scope"])
		return nil
	}
	if before && known != ch {
		return nil // it was answered for another token server
	}
	if z.widen(ctx, from, answer["scope"]) {
		return nil
	}
	key, _ := z.tokenKey(ctx, from, ch, o)
	z.c.forgetToken(key)
	z.c.forgetOwner(z.ownerKey(from, o.session))
	if strikes(responses) < 2 {
		return nil // the token may have been old
	}
	if z.refuse(ctx, from, o) {
		return nil
	}
	return &deniedError{host: from.host, known: o != nobody}
}

// choose picks the challenge to answer: a token rather than a password.
func choose(list []auth.Challenge) (challenge, map[string]string, bool) {
	for _, c := range list {
		if c.Scheme == auth.BearerAuth && c.Parameters["realm"] != "" {
			return challenge{c.Scheme, c.Parameters["realm"], c.Parameters["service"]}, c.Parameters, true
		}
	}
	for _, c := range list {
		if c.Scheme == auth.BasicAuth {
			return challenge{scheme: c.Scheme}, c.Parameters, true
		}
	}
	return challenge{}, nil, false
}

// strikes counts how often the last request was refused with authorization.
func strikes(responses []*http.Response) int {
	last, n := responses[len(responses)-1].Request, 0
	for _, r := range responses {
		if r.StatusCode == http.StatusUnauthorized && r.Request.Method == last.Method &&
			*r.Request.URL == *last.URL && r.Request.Header.Get("Authorization") != "" {
			n++
		}
	}
	return n
}

// owner returns the first owner in the group that wasn't refused.
func (z *authorizer) owner(ctx context.Context, from origin) (*owner, error) {
	ids, err := z.a.sessions(ctx)
	if err != nil {
		return nil, err
	}
	anonymous := len(ids) == 0
	var last error = &deniedError{host: from.host, known: true}
	for _, id := range ids {
		key := z.refusal(ctx, from, id)
		z.mu.Lock()
		skip := z.refused[key]
		z.mu.Unlock()
		if skip {
			continue
		}
		o, err := z.c.owner(ctx, z.a.Sessions, key.ownerKey)
		switch {
		case err != nil:
			last = err
		case o == nobody:
			anonymous = true
		default:
			return o, nil
		}
	}
	if anonymous {
		return nobody, nil
	}
	return nil, last
}

func (z *authorizer) refusal(ctx context.Context, from origin, id string) refusal {
	return refusal{z.ownerKey(from, id), fmt.Sprint(z.scopes(ctx, from).list())}
}

// ownerKey names the owner behind a session for what from wants.
func (z *authorizer) ownerKey(from origin, id string) ownerKey {
	z.c.mu.Lock()
	defer z.c.mu.Unlock()
	return ownerKey{from.host, id, z.c.challenges[from].scheme}
}

// refuse passes o over for what is asked for in ctx. It reports whether there
// is another owner to try.
func (z *authorizer) refuse(ctx context.Context, from origin, o *owner) bool {
	if o == nobody {
		return false
	}
	key := z.refusal(ctx, from, o.session)
	z.mu.Lock()
	z.refused[key] = true
	z.mu.Unlock()
	next, err := z.owner(ctx, from)
	return err == nil && next != nobody && next.id != o.id
}

// widen adds scopes that the registry asks for beyond those of the request. It
// reports whether that changed anything.
func (z *authorizer) widen(ctx context.Context, from origin, asked string) bool {
	want := parseScopes(asked)
	if z.scopes(ctx, from).contains(want) {
		return false
	}
	z.mu.Lock()
	defer z.mu.Unlock()
	z.extra[from] = parseScopes(append(z.extra[from].list(), want.list()...)...)
	return true
}

// scopes are those of the request in ctx and those the registry asked for.
func (z *authorizer) scopes(ctx context.Context, from origin) scopes {
	z.mu.Lock()
	defer z.mu.Unlock()
	return parseScopes(docker.GetTokenScopes(ctx, z.extra[from].list())...)
}

func (z *authorizer) tokenKey(ctx context.Context, from origin, ch challenge, o *owner) (tokenKey, scopes) {
	s := z.scopes(ctx, from)
	return tokenKey{from, ch.realm, ch.service, o.id, fmt.Sprint(s.list())}, s
}
