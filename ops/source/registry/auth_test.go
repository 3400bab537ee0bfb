package registry

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
	"github.com/kilnbuild/kiln/ops/sessiontest"
	"github.com/kilnbuild/kiln/ops/source/registry/registrytest"
	"github.com/moby/buildkit/session"
	sessionauth "github.com/moby/buildkit/session/auth"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/crypto/nacl/sign"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// keeper is a client's auth service.
type keeper struct {
	sessionauth.UnimplementedAuthServer
	user, secret string
	key          *[64]byte // of its token authority; nil for none
	public       []byte
	asked        atomic.Int64
	fetched      atomic.Int64
}

func (k *keeper) Register(s *grpc.Server) { sessionauth.RegisterAuthServer(s, k) }

func (k *keeper) Credentials(context.Context, *sessionauth.CredentialsRequest) (*sessionauth.CredentialsResponse, error) {
	k.asked.Add(1)
	return &sessionauth.CredentialsResponse{Username: k.user, Secret: k.secret}, nil
}

func (k *keeper) GetTokenAuthority(context.Context, *sessionauth.GetTokenAuthorityRequest) (*sessionauth.GetTokenAuthorityResponse, error) {
	if k.key == nil {
		return nil, status.Error(codes.Unavailable, "client side tokens disabled")
	}
	return &sessionauth.GetTokenAuthorityResponse{PublicKey: k.public}, nil
}

func (k *keeper) VerifyTokenAuthority(_ context.Context, req *sessionauth.VerifyTokenAuthorityRequest) (*sessionauth.VerifyTokenAuthorityResponse, error) {
	return &sessionauth.VerifyTokenAuthorityResponse{Signed: sign.Sign(nil, req.Payload, k.key)}, nil
}

func (k *keeper) FetchToken(ctx context.Context, req *sessionauth.FetchTokenRequest) (*sessionauth.FetchTokenResponse, error) {
	k.fetched.Add(1)
	c := New(Config{})
	defer c.Close()
	e, err := c.endpoint(clientKey{host: "token"}, HostConfig{})
	if err != nil {
		return nil, err
	}
	resp, err := auth.FetchToken(ctx, e.client, nil, auth.TokenOptions{
		Realm: req.Realm, Service: req.Service, Scopes: req.Scopes, Username: k.user, Secret: k.secret,
	})
	if err != nil {
		return nil, err
	}
	return &sessionauth.FetchTokenResponse{Token: resp.Token, ExpiresIn: 300}, nil
}

func newKey(t *testing.T) (*[64]byte, []byte) {
	t.Helper()
	public, private, err := sign.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return private, public[:]
}

// private is a registry with one image that needs credentials.
func private(t *testing.T, change ...func(*registrytest.Auth)) (*registrytest.Registry, string) {
	t.Helper()
	reg := registrytest.New(t)
	reg.Push(t, "a/b", "1", registrytest.Image{})
	reg.Change(func() {
		reg.Users = map[string]string{"user": "pass", "other": "word", "<token>": "identity"}
		for _, fn := range change {
			fn(&reg.Auth)
		}
	})
	return reg, reg.Host + "/a/b:1"
}

// compat: SES-060, DMN-103, DMN-104
func TestCredentials(t *testing.T) {
	sm := sessiontest.Manager(t)
	basic := func(a *registrytest.Auth) { a.Basic = true }
	open := func(a *registrytest.Auth) { a.Users[""] = "" }
	key, public := newKey(t)
	for _, tt := range []struct {
		name     string
		registry func(*registrytest.Auth)
		sessions []session.Attachable
		fails    string
	}{
		{"password for a token", nil, []session.Attachable{&keeper{user: "user", secret: "pass"}}, ""},
		{"wrong password", nil, []session.Attachable{&keeper{user: "user", secret: "x"}}, "get token from"},
		{"identity token", nil, []session.Attachable{&keeper{secret: "identity"}}, ""},
		{"identity token by name", nil, []session.Attachable{&keeper{user: "<token>", secret: "identity"}}, ""},
		{"basic", basic, []session.Attachable{&keeper{user: "user", secret: "pass"}}, ""},
		{"basic, from who could fetch tokens", basic, []session.Attachable{&keeper{user: "user", secret: "pass", key: key, public: public}}, ""},
		{"basic, wrong", basic, []session.Attachable{&keeper{user: "user", secret: "x"}}, "are refused"},
		{"basic, none", basic, nil, "needs credentials; the client has none for 127.0.0.1"},
		{"anonymous", open, nil, ""},
		{"anonymous with an empty answer", open, []session.Attachable{&keeper{}}, ""},
		{"anonymous where that isn't enough", nil, nil, "get token from"},
		{"the second session's", nil, []session.Attachable{&keeper{}, &keeper{user: "other", secret: "word"}}, ""},
		{"the second session's after a refusal", nil, []session.Attachable{&keeper{user: "user", secret: "x"}, &keeper{user: "other", secret: "word"}}, ""},
		{"the second session's password after a refusal", basic, []session.Attachable{&keeper{user: "user", secret: "x"}, &keeper{user: "other", secret: "word"}}, ""},
		{"a session without the service", open, []session.Attachable{attachNothing{}}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, ref := private(t, func(a *registrytest.Auth) {
				if tt.registry != nil {
					tt.registry(a)
				}
			})
			var ids []string
			for _, a := range tt.sessions {
				ids = append(ids, sessiontest.Connect(t, sm, "", a))
			}
			c := newTestClient(Config{})
			defer c.Close()
			a := Access{Sessions: sm, Group: session.NewGroup(ids...)}
			err := pull(t, c.Resolver(a), ref)
			check(t, err, tt.fails)
			for _, secret := range []string{"pass", "word", "identity"} {
				if err != nil && strings.Contains(err.Error(), secret) {
					t.Errorf("%v names a secret", err)
				}
			}
			if err == nil {
				check(t, pull(t, c.Resolver(a), ref), "")
			}
		})
	}
}

type attachNothing struct{}

func (attachNothing) Register(*grpc.Server) {}

// compat: SES-026, SES-063
func TestTokensStayWithTheirOwner(t *testing.T) {
	sm := sessiontest.Manager(t)
	reg, ref := private(t)
	c := newTestClient(Config{})
	defer c.Close()
	as := func(id string) error {
		return pull(t, c.Resolver(Access{Sessions: sm, Group: session.NewGroup(id)}), ref)
	}

	check(t, as(sessiontest.Connect(t, sm, "", &keeper{user: "user", secret: "pass"})), "")
	if n := reg.Issued(); n != 1 {
		t.Fatalf("%d tokens for one owner", n)
	}
	check(t, as(sessiontest.Connect(t, sm, "", &keeper{user: "user", secret: "pass"})), "")
	if n := reg.Issued(); n != 1 {
		t.Errorf("a session that has the same secret got a token of its own (%d)", n)
	}
	check(t, as(sessiontest.Connect(t, sm, "", &keeper{user: "other", secret: "word"})), "")
	if n := reg.Issued(); n != 2 {
		t.Errorf("%d tokens for two owners", n)
	}
	check(t, as(sessiontest.Connect(t, sm, "", &keeper{})), "get token from")
	check(t, as(sessiontest.Connect(t, sm, "", attachNothing{})), "get token from")
	check(t, as(sessiontest.Connect(t, sm, "", &keeper{user: "user", secret: "x"})), "get token from")
}

// compat: SES-061, SES-062, SES-063
func TestTokenAuthority(t *testing.T) {
	sm := sessiontest.Manager(t)
	reg, ref := private(t)
	c := newTestClient(Config{})
	defer c.Close()
	as := func(id string) error {
		return pull(t, c.Resolver(Access{Sessions: sm, Group: session.NewGroup(id)}), ref)
	}
	key, public := newKey(t)
	first := &keeper{user: "user", secret: "pass", key: key, public: public}
	check(t, as(sessiontest.Connect(t, sm, "", first)), "")
	if first.fetched.Load() != 1 || first.asked.Load() != 0 {
		t.Errorf("tokens fetched %d times, secrets asked %d times", first.fetched.Load(), first.asked.Load())
	}
	again := &keeper{user: "user", secret: "pass", key: key, public: public}
	check(t, as(sessiontest.Connect(t, sm, "", again)), "")
	if again.fetched.Load() != 0 || reg.Issued() != 1 {
		t.Error("a session with the same key didn't get the token")
	}
	stranger, _ := newKey(t)
	check(t, as(sessiontest.Connect(t, sm, "", &keeper{user: "user", secret: "wrong", key: stranger, public: public})), "can't prove its token authority")
}

// compat: SES-064
func TestScopesOfTokens(t *testing.T) {
	sm := sessiontest.Manager(t)
	reg, ref := private(t)
	id := sessiontest.Connect(t, sm, "", &keeper{user: "user", secret: "pass"})
	c := newTestClient(Config{})
	defer c.Close()
	r := c.Resolver(Access{Sessions: sm, Group: session.NewGroup(id)})
	check(t, pull(t, r, ref), "")
	push := func(r *Resolver, s string) error {
		desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromString(s), Size: int64(len(s))}
		_, err := r.Push(t.Context(), ref, desc, opener([]byte(s)))
		return err
	}
	check(t, push(r, "one"), "")
	issued := reg.Issued()
	check(t, push(r, "two"), "")
	check(t, pull(t, r, ref), "")
	if reg.Issued() != issued {
		t.Errorf("%d more tokens for scopes that were granted", reg.Issued()-issued)
	}

	reg.Change(func() { reg.Narrow = true })
	reg.Expire()
	r = c.Resolver(Access{Sessions: sm, Group: session.NewGroup(id)})
	check(t, push(r, "three"), "access denied")
	reg.Requests()
	check(t, push(r, "four"), "access denied")
	if n := len(reg.Requests()); n > 12 {
		t.Errorf("%d requests to find out that a push isn't allowed", n)
	}
}

// compat: SES-065
func TestExpiredToken(t *testing.T) {
	sm := sessiontest.Manager(t)
	reg, ref := private(t)
	a := Access{Sessions: sm, Group: session.NewGroup(sessiontest.Connect(t, sm, "", &keeper{user: "user", secret: "pass"}))}
	c := newTestClient(Config{})
	defer c.Close()
	check(t, pull(t, c.Resolver(a), ref), "")
	reg.Expire()
	check(t, pull(t, c.Resolver(a), ref), "")
	if n := reg.Issued(); n != 2 {
		t.Errorf("%d tokens after one expired", n)
	}
}

// compat: DMN-106
func TestRemembered(t *testing.T) {
	sm := sessiontest.Manager(t)
	reg, ref := private(t)
	k := &keeper{user: "user", secret: "pass"}
	a := Access{Sessions: sm, Group: session.NewGroup(sessiontest.Connect(t, sm, "", k))}
	c := newTestClient(Config{})
	defer c.Close()
	check(t, pull(t, c.Resolver(a), ref), "")
	reg.Requests()
	check(t, pull(t, c.Resolver(a), ref), "")
	if got := reg.Requests(); len(got) != 2 {
		t.Errorf("requests of a second pull: %q", got)
	}
	if k.asked.Load() != 1 {
		t.Errorf("credentials were asked for %d times", k.asked.Load())
	}
}

// compat: SES-024
func TestDeadSession(t *testing.T) {
	sm := sessiontest.Manager(t)
	_, ref := private(t)
	id := sessiontest.Connect(t, sm, "", &keeper{user: "user", secret: "pass"})
	c := newTestClient(Config{})
	defer c.Close()
	check(t, pull(t, c.Resolver(Access{Sessions: sm, Group: session.NewGroup("gone", id)}), ref), "")
}

func TestOwnersAreForgotten(t *testing.T) {
	c := New(Config{})
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := range 10_001 {
		c.owners[ownerKey{host: "h", session: fmt.Sprint(i)}] = nobody
	}
	c.tokens[tokenKey{owner: "x"}] = &token{}
	c.forgetIdleLocked()
	if len(c.owners) != 0 || len(c.tokens) != 0 {
		t.Errorf("%d owners and %d tokens are kept", len(c.owners), len(c.tokens))
	}
}

// Requests may be made for others who hold the same credentials for the same
// host, and for nobody else.
func TestOwners(t *testing.T) {
	sm := sessiontest.Manager(t)
	key, public := newKey(t)
	other, otherPublic := newKey(t)
	ids := map[string]string{"nobody": sessiontest.Connect(t, sm, ""), "also nobody": sessiontest.Connect(t, sm, "", &keeper{})}
	for name, k := range map[string]*keeper{
		"secret": {user: "user", secret: "pass"}, "same secret": {user: "user", secret: "pass"},
		"other secret": {user: "user", secret: "word"}, "other user": {user: "userp", secret: "ass"},
		"key": {key: key, public: public}, "same key": {key: key, public: public}, "other key": {key: other, public: otherPublic},
	} {
		ids[name] = sessiontest.Connect(t, sm, "", k)
	}
	c := New(Config{Hosts: map[string]HostConfig{"mirrored": {Mirrors: []string{"mirror"}}}})
	defer c.Close()
	owners := func(who ...string) string {
		var group []string
		for _, name := range who {
			group = append(group, ids[name])
		}
		got, err := c.Owners(t.Context(), Access{Sessions: sm, Group: session.NewGroup(group...)}, Reference{Host: "mirrored", Repository: "x"})
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(got, "pass") {
			t.Errorf("the secret is in %s", got)
		}
		return got
	}
	for _, tt := range []struct {
		a, b []string
		same bool
	}{
		{[]string{"nobody"}, []string{"also nobody"}, true},
		{[]string{"secret"}, []string{"same secret"}, true},
		{[]string{"key"}, []string{"same key"}, true},
		{[]string{"secret", "nobody"}, []string{"nobody", "same secret"}, true},
		{[]string{"secret"}, []string{"other secret"}, false},
		{[]string{"secret"}, []string{"other user"}, false},
		{[]string{"secret"}, []string{"nobody"}, false},
		{[]string{"key"}, []string{"other key"}, false},
		{[]string{"key"}, []string{"nobody"}, false},
		{[]string{"secret", "key"}, []string{"secret"}, false},
	} {
		if a, b := owners(tt.a...), owners(tt.b...); (a == b) != tt.same {
			t.Errorf("%q and %q: %s and %s", tt.a, tt.b, a, b)
		}
	}
	if got := owners("secret"); !strings.Contains(got, "mirror ") || !strings.Contains(got, "mirrored ") {
		t.Errorf("not about every host: %s", got)
	}
}

// What was read with somebody's credentials is for those who have them.
func TestReaders(t *testing.T) {
	sm := sessiontest.Manager(t)
	key, public := newKey(t)
	connect := func(k *keeper) session.Group { return session.NewGroup(sessiontest.Connect(t, sm, "", k)) }
	for name, change := range map[string]func(*registrytest.Auth){
		"tokens":             func(*registrytest.Auth) {},
		"passwords":          func(a *registrytest.Auth) { a.Basic = true },
		"for those who want": func(a *registrytest.Auth) { a.Users[""] = "" },
	} {
		t.Run(name, func(t *testing.T) {
			reg, text := private(t, change)
			ref, err := ParseReference(text)
			if err != nil {
				t.Fatal(err)
			}
			c := newTestClient(Config{})
			defer c.Close()
			may := func(c *Client, g session.Group, readers []string) bool {
				t.Helper()
				ok, err := c.Resolver(Access{Sessions: sm, Group: g}).MayRead(t.Context(), ref, readers)
				if err != nil {
					t.Error(err)
				}
				return ok
			}
			reads := func(g session.Group) []string {
				t.Helper()
				r := c.Resolver(Access{Sessions: sm, Group: g})
				if _, _, err := r.Resolve(t.Context(), text); err != nil {
					t.Fatal(err)
				}
				return r.Readers()
			}
			first, again := connect(&keeper{user: "user", secret: "pass"}), connect(&keeper{user: "user", secret: "pass"})
			other := connect(&keeper{user: "other", secret: "word"})
			readers := reads(first)
			if len(readers) != 1 || !may(c, first, readers) || !may(c, again, readers) || may(c, other, readers) || may(c, nil, readers) {
				t.Errorf("readers %q: the same %v and %v, another %v, a stranger %v", readers, may(c, first, readers), may(c, again, readers), may(c, other, readers), may(c, nil, readers))
			}
			if _, open := reg.Users[""]; open {
				if readers := reads(nil); len(readers) > 0 || !may(c, other, readers) {
					t.Errorf("what strangers read is for %q", readers)
				}
			}
			own := keeper{user: "user", secret: "pass", key: key, public: public}
			if readers := reads(connect(&own)); len(readers) != 1 || may(c, other, readers) {
				t.Errorf("who fetches tokens himself: readers %q", readers)
			}
			later := newTestClient(Config{})
			defer later.Close()
			if may(later, first, readers) {
				t.Error("another daemon knows whose credentials they were")
			}
		})
	}
}
