// Package registry talks to image registries, for whoever pulls, pushes or
// resolves: which hosts answer for a name, over which transport, with whose
// credentials, how often a request is tried, and how its failure is told.
//
// A Client is shared by all builds: it pools connections, remembers the
// challenges of registries and caches tokens. A Resolver is the view of one
// group of sessions on it. Credentials are asked of those sessions when a
// registry demands them; a token is reused by another session only when that
// session proves to be of the same owner (owner.go). Nothing of it is stored.
//
// The package doesn't verify content: readers compare digests.
package registry

import (
	"net/http"
	"sync"
	"time"

	"github.com/moby/buildkit/session"
	"golang.org/x/sync/semaphore"
)

// DefaultConcurrency is how many blobs are transferred at once per registry.
const DefaultConcurrency = 4

// Config says how registries are reached.
type Config struct {
	// Hosts is keyed by host, with port, as it stands in references. Docker
	// Hub is "docker.io".
	Hosts map[string]HostConfig
	// MaxConcurrency bounds the blob transfers per registry, in each direction;
	// 0 is DefaultConcurrency. Manifests and configs may use one connection more.
	MaxConcurrency int
	// UserAgent is sent with every request; "" is "kiln".
	UserAgent string
}

// HostConfig is one [registry."host"] section.
type HostConfig struct {
	// Mirrors are asked before the host itself, in order, to resolve and to
	// pull. Each is a host with an optional path prefix.
	Mirrors []string
	// PlainHTTP says whether the host speaks HTTP without TLS. When nil, hosts
	// on the loopback interface are tried with HTTPS, then with HTTP.
	PlainHTTP *bool
	// Insecure skips the verification of certificates and, together with
	// PlainHTTP, tries HTTPS before HTTP.
	Insecure *bool
	// RootCAs are PEM files that are trusted beside the system's.
	RootCAs []string
	// KeyPairs are client certificates.
	KeyPairs []KeyPair
	// TLSConfigDirs hold further *.crt (CAs) and *.cert with *.key (pairs).
	TLSConfigDirs []string
}

// KeyPair names the PEM files of a client certificate.
type KeyPair struct {
	Key, Cert string
}

// Client is what all requests share. Its methods are safe for concurrent use.
type Client struct {
	cfg    Config
	header http.Header
	delay  time.Duration // before the first retry

	mu         sync.Mutex // guards the fields below; never held across I/O
	clients    map[clientKey]*endpoint
	limits     map[route]*limit
	challenges map[origin]challenge
	owners     map[ownerKey]*owner
	tokens     map[tokenKey]*token
}

// route is a registry and the direction of transfers with it. Uploads have a
// limit of their own: what they send may have to be fetched from the same
// registry first.
type route struct {
	host   string
	upload bool
}

// limit bounds the transfers on one route.
type limit struct {
	blobs, all *semaphore.Weighted
}

// New returns a client for cfg. Files that cfg names are read when their host
// is first used.
func New(cfg Config) *Client {
	if cfg.MaxConcurrency <= 0 {
		cfg.MaxConcurrency = DefaultConcurrency
	}
	if cfg.UserAgent == "" {
		cfg.UserAgent = "kiln"
	}
	return &Client{
		cfg:        cfg,
		header:     http.Header{"User-Agent": {cfg.UserAgent}},
		delay:      firstDelay,
		clients:    map[clientKey]*endpoint{},
		limits:     map[route]*limit{},
		challenges: map[origin]challenge{},
		owners:     map[ownerKey]*owner{},
		tokens:     map[tokenKey]*token{},
	}
}

// Close drops idle connections and everything remembered.
func (c *Client) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.clients {
		e.base.CloseIdleConnections()
	}
	clear(c.clients)
	clear(c.challenges)
	clear(c.owners)
	clear(c.tokens)
}

// Access says how a Resolver uses registries.
type Access struct {
	Sessions *session.Manager
	Group    session.Group
	// Insecure overrides the configuration of every host: certificates aren't
	// verified, and HTTP is tried when HTTPS isn't spoken.
	Insecure bool
}

func (c *Client) limit(r route) *limit {
	c.mu.Lock()
	defer c.mu.Unlock()
	l, ok := c.limits[r]
	if !ok {
		n := int64(c.cfg.MaxConcurrency)
		l = &limit{blobs: semaphore.NewWeighted(n), all: semaphore.NewWeighted(n + 1)}
		c.limits[r] = l
	}
	return l
}
