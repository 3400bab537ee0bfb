package registry

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
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

// ownerKey: a session has one owner for each way to be authorized, for one that
// fetches tokens itself may have to give a password to another registry.
type ownerKey struct {
	host, session string
	scheme        auth.AuthenticationScheme
}

// nobody pulls anonymously.
var nobody = &owner{id: "nobody"}

// at names o as the owner behind requests to a host.
func (o *owner) at(host string) string { return host + " " + o.id }

// hashKey makes the ids of credentials useless outside of this process.
var hashKey = func() []byte {
	key := make([]byte, 32)
	rand.Read(key) // never fails
	return key
}()

// owner returns the owner behind a session at a host, asking the session once.
func (c *Client) owner(ctx context.Context, sm *session.Manager, key ownerKey) (*owner, error) {
	c.mu.Lock()
	o, ok := c.owners[key]
	if ok && o != nobody {
		o.used = time.Now()
	}
	c.mu.Unlock()
	if ok {
		return o, nil
	}
	o, err := askOwner(ctx, sm, key)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.forgetIdleLocked()
	c.owners[key] = o
	return o, nil
}

// Owners tells whose credentials requests about ref may use: it is the same for
// groups that prove to hold the same keys or secrets for each of the hosts that
// answer for ref, or none. It is worth nothing outside of this process.
func (c *Client) Owners(ctx context.Context, a Access, ref Reference) (string, error) {
	all, err := c.ownersAt(ctx, a, ref, func(origin) bool { return true })
	return fmt.Sprintf("%q", all), err
}

// mayShow are the owners in a's group that are shown to the hosts for ref which
// have wanted credentials so far.
func (c *Client) mayShow(ctx context.Context, a Access, ref Reference) ([]string, error) {
	return c.ownersAt(ctx, a, ref, func(from origin) bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		_, wants := c.challenges[from]
		return wants
	})
}

// ownersAt lists the owners in a's group at those hosts for ref that are asked.
func (c *Client) ownersAt(ctx context.Context, a Access, ref Reference, asked func(origin) bool) (all []string, err error) {
	hosts, err := c.hosts(ref.Host, a.Insecure)
	if err != nil {
		return nil, err
	}
	ids, err := a.sessions(ctx)
	if err != nil {
		return nil, err
	}
	z := newAuthorizer(c, a)
	for _, h := range hosts {
		from := origin{h.Host, a.Insecure}
		if !asked(from) {
			continue
		}
		for _, id := range ids {
			o, err := c.owner(ctx, a.Sessions, z.ownerKey(from, id))
			if err != nil {
				return nil, err
			}
			if o != nobody {
				all = append(all, o.at(h.Host))
			}
		}
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

func askOwner(ctx context.Context, sm *session.Manager, key ownerKey) (*owner, error) {
	if key.scheme != auth.BasicAuth {
		o, err := askAuthority(ctx, sm, key)
		if o != nil || err != nil {
			return o, err
		}
	}
	_, username, secret, err := sessionauth.CredentialsFunc(ctx, sm, session.NewGroup(key.session))(key.host)
	if err != nil {
		return nil, fmt.Errorf("ask session for credentials for %s: %w", key.host, err)
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
		session: key.session, username: username, secret: secret, used: time.Now(),
	}, nil
}

// askAuthority returns the owner that fetches tokens for its session, nil if
// the session leaves that to the daemon.
func askAuthority(ctx context.Context, sm *session.Manager, key ownerKey) (*owner, error) {
	g := session.NewGroup(key.session)
	_, public, err := sessionauth.GetTokenAuthority(ctx, key.host, sm, g)
	if err != nil {
		return nil, fmt.Errorf("ask session for its token authority for %s: %w", key.host, err)
	}
	if public == nil {
		return nil, nil
	}
	_, ok, err := sessionauth.VerifyTokenAuthority(ctx, key.host, public, sm, g)
	if err != nil {
		return nil, fmt.Errorf("verify token authority of session for %s: %w", key.host, err)
	}
	if !ok {
		return nil, fmt.Errorf("session can't prove its token authority for %s", key.host)
	}
	return &owner{id: "key:" + hex.EncodeToString(public[:]), session: key.session, fetches: true, used: time.Now()}, nil
}

// forgetOwner makes the next request ask the session again.
func (c *Client) forgetOwner(key ownerKey) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.owners, key)
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
