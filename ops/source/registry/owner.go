package registry

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/moby/buildkit/session"
	sessionauth "github.com/moby/buildkit/session/auth"
)

// idle is how long owners, tokens and challenges are remembered unused.
const idle = 10 * time.Minute

// owner is whom a token belongs to. Two sessions have the same owner only if
// both proved to hold the same key or the same secret.
type owner struct {
	// id is what tokens are cached under: nobody, a public key that the
	// session signed for, or a keyed hash of its credentials.
	id      string
	session string // "" for nobody
	// fetches: the session fetches tokens itself and keeps its secret.
	fetches          bool
	username, secret string
	used             time.Time
}

type ownerKey struct{ host, session string }

// nobody pulls anonymously.
var nobody = &owner{id: "nobody"}

// hashKey makes the ids of credentials useless outside of this process.
var hashKey = func() []byte {
	key := make([]byte, 32)
	rand.Read(key) // never fails
	return key
}()

// owner returns the owner behind a session at host, asking the session once.
func (c *Client) owner(ctx context.Context, sm *session.Manager, id, host string) (*owner, error) {
	key := ownerKey{host, id}
	c.mu.Lock()
	o, ok := c.owners[key]
	if ok && o != nobody {
		o.used = time.Now()
	}
	c.mu.Unlock()
	if ok {
		return o, nil
	}
	o, err := askOwner(ctx, sm, id, host)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.forgetIdleLocked()
	c.owners[key] = o
	return o, nil
}

func askOwner(ctx context.Context, sm *session.Manager, id, host string) (*owner, error) {
	g := session.NewGroup(id)
	_, key, err := sessionauth.GetTokenAuthority(ctx, host, sm, g)
	if err != nil {
		return nil, fmt.Errorf("ask session for its token authority for %s: %w", host, err)
	}
	if key != nil {
		_, ok, err := sessionauth.VerifyTokenAuthority(ctx, host, key, sm, g)
		if err != nil {
			return nil, fmt.Errorf("verify token authority of session for %s: %w", host, err)
		}
		if !ok {
			return nil, fmt.Errorf("session can't prove its token authority for %s", host)
		}
		return &owner{id: "key:" + hex.EncodeToString(key[:]), session: id, fetches: true, used: time.Now()}, nil
	}
	_, username, secret, err := sessionauth.CredentialsFunc(ctx, sm, g)(host)
	if err != nil {
		return nil, fmt.Errorf("ask session for credentials for %s: %w", host, err)
	}
	if secret == "" {
		return nobody, nil
	}
	if username == "<token>" {
		username = "" // the secret is an identity token
	}
	mac := hmac.New(sha256.New, hashKey)
	fmt.Fprintf(mac, "%q %q", username, secret)
	return &owner{
		id:      "secret:" + hex.EncodeToString(mac.Sum(nil)),
		session: id, username: username, secret: secret, used: time.Now(),
	}, nil
}

// forgetOwner makes the next request ask the session again.
func (c *Client) forgetOwner(host, id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.owners, ownerKey{host, id})
}

func (c *Client) forgetIdleLocked() {
	now := time.Now()
	for k, o := range c.owners {
		if o != nobody && now.Sub(o.used) > idle {
			delete(c.owners, k)
		}
	}
	for k, t := range c.tokens {
		if now.Sub(t.used) > idle {
			delete(c.tokens, k)
		}
	}
	if len(c.owners) > 10_000 { // sessions without credentials
		clear(c.owners)
	}
}

// sessions lists the connected sessions of the group. When none is, it waits
// a little for one to appear: a build may be asked for before its session is
// there.
func (a Access) sessions(ctx context.Context) ([]string, error) {
	if a.Sessions == nil {
		return nil, nil
	}
	var live []string
	for _, id := range session.AllSessionIDs(a.Group) {
		caller, err := a.Sessions.Get(ctx, id, true)
		if err != nil {
			return nil, err
		}
		if caller != nil {
			live = append(live, id)
		}
	}
	if len(live) > 0 {
		return live, nil
	}
	err := a.Sessions.Any(ctx, a.Group, func(_ context.Context, id string, _ session.Caller) error {
		live = append(live, id)
		return nil
	})
	if err != nil && !errors.Is(err, session.ErrNoActiveSessions) && ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return live, nil
}
