package registry

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

const (
	dockerHub         = "docker.io"
	dockerHubEndpoint = "registry-1.docker.io"
	apiPath           = "/v2"
)

// clientKey names an HTTP client: those of mirrors give up sooner, since
// another host can answer.
type clientKey struct {
	host             string
	mirror, insecure bool
}

// endpoint is how a host is reached.
type endpoint struct {
	scheme string
	client *http.Client
	base   *http.Transport
}

// hosts returns who answers for the registry named in a reference: its
// mirrors, then itself.
func (c *Client) hosts(name string, insecure bool) ([]docker.RegistryHost, error) {
	var out []docker.RegistryHost
	for _, m := range c.cfg.Hosts[name].Mirrors {
		h, err := c.mirror(m, insecure)
		if err != nil {
			return nil, fmt.Errorf("mirror %s of registry %s: %w", m, name, err)
		}
		out = append(out, h)
	}
	host := name
	if host == dockerHub {
		host = dockerHubEndpoint
	}
	e, err := c.endpoint(clientKey{host: host, insecure: insecure}, c.cfg.Hosts[name])
	if err != nil {
		return nil, fmt.Errorf("registry %s: %w", name, err)
	}
	return append(out, docker.RegistryHost{
		Client: e.client, Scheme: e.scheme, Host: host, Path: apiPath,
		Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve | docker.HostCapabilityPush,
	}), nil
}

func (c *Client) mirror(spec string, insecure bool) (docker.RegistryHost, error) {
	u, err := url.Parse(spec)
	if err != nil || u.Host == "" {
		if u, err = url.Parse("//" + spec); err != nil {
			return docker.RegistryHost{}, err
		}
	}
	if u.Host == "" {
		return docker.RegistryHost{}, errors.New("names no host")
	}
	cfg := c.cfg.Hosts[u.Host]
	if u.Scheme == "http" && cfg.PlainHTTP == nil {
		plain := true
		cfg.PlainHTTP = &plain
	}
	e, err := c.endpoint(clientKey{host: u.Host, mirror: true, insecure: insecure}, cfg)
	if err != nil {
		return docker.RegistryHost{}, err
	}
	return docker.RegistryHost{
		Client: e.client, Scheme: e.scheme, Host: u.Host, Path: path.Join(apiPath, u.Path),
		Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve,
	}, nil
}

// endpoint returns the pooled endpoint of key, made from cfg when it is first
// asked for.
func (c *Client) endpoint(key clientKey, cfg HostConfig) (*endpoint, error) {
	c.mu.Lock()
	e, ok := c.clients[key]
	c.mu.Unlock()
	if ok {
		return e, nil
	}
	e, err := c.newEndpoint(key, cfg)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if first, ok := c.clients[key]; ok {
		return first, nil
	}
	c.clients[key] = e
	return e, nil
}

func (c *Client) newEndpoint(key clientKey, cfg HostConfig) (*endpoint, error) {
	tc, err := tlsConfig(cfg)
	if err != nil {
		return nil, err
	}
	loopback, err := docker.MatchLocalhost(key.host)
	if err != nil {
		return nil, fmt.Errorf("host name %q: %w", key.host, err)
	}
	plain := loopback
	if cfg.PlainHTTP != nil {
		plain = *cfg.PlainHTTP
	}
	insecure := key.insecure || cfg.Insecure != nil && *cfg.Insecure
	tc.InsecureSkipVerify = insecure

	e := &endpoint{scheme: "https", base: newTransport(tc)}
	var rt http.RoundTripper = e.base
	switch {
	case key.insecure, plain && (insecure || cfg.PlainHTTP == nil):
		rt = docker.NewHTTPFallback(rt)
	case plain:
		e.scheme = "http"
		rt = plainOnly{rt}
	}
	attempts := attemptsLast
	if key.mirror {
		attempts = attemptsMirror
	}
	e.client = &http.Client{Transport: &retrier{
		base: rt, host: key.host, attempts: attempts, delay: c.delay,
	}}
	return e, nil
}

// errWantsTLS: a registry was asked over HTTP and speaks HTTPS.
var errWantsTLS = errors.New("HTTPS server")

// plainOnly tells a server that wants HTTPS from one that doesn't like the
// request: programs in Go, as registries are, answer in HTTP/1.0 on behalf of
// the former.
type plainOnly struct{ base http.RoundTripper }

// RoundTrip implements http.RoundTripper.
func (p plainOnly) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := p.base.RoundTrip(req)
	if err == nil && resp.StatusCode == http.StatusBadRequest && !resp.ProtoAtLeast(1, 1) {
		discard(resp.Body)
		return nil, errWantsTLS
	}
	return resp, err
}

func newTransport(tc *tls.Config) *http.Transport {
	return &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 30 * time.Second, KeepAlive: 60 * time.Second}).DialContext,
		TLSClientConfig:       tc,
		TLSHandshakeTimeout:   10 * time.Second,
		ExpectContinueTimeout: 5 * time.Second,
		ResponseHeaderTimeout: 2 * time.Minute,
		MaxIdleConns:          32,
		MaxIdleConnsPerHost:   8,
		IdleConnTimeout:       2 * time.Minute,
		WriteBufferSize:       64 << 10,
		ReadBufferSize:        64 << 10,
	}
}

// tlsConfig reads the certificates that cfg names.
func tlsConfig(cfg HostConfig) (*tls.Config, error) {
	cas, pairs := cfg.RootCAs, cfg.KeyPairs
	for _, dir := range cfg.TLSConfigDirs {
		entries, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			continue // such directories are often configured for all machines alike
		}
		if err != nil {
			return nil, fmt.Errorf("read tlsconfigdir: %w", err)
		}
		for _, e := range entries {
			file := filepath.Join(dir, e.Name())
			if strings.HasSuffix(file, ".crt") {
				cas = append(cas[:len(cas):len(cas)], file)
			}
			if base, ok := strings.CutSuffix(file, ".cert"); ok {
				pairs = append(pairs[:len(pairs):len(pairs)], KeyPair{Key: base + ".key", Cert: file})
			}
		}
	}
	tc := &tls.Config{MinVersion: tls.VersionTLS12}
	if len(cas) > 0 {
		pool, err := x509.SystemCertPool()
		if err != nil {
			return nil, fmt.Errorf("load system certificates: %w", err)
		}
		for _, file := range cas {
			pem, err := os.ReadFile(file)
			if err != nil {
				return nil, fmt.Errorf("read CA: %w", err)
			}
			if !pool.AppendCertsFromPEM(pem) {
				return nil, fmt.Errorf("CA file %s holds no PEM certificate", file)
			}
		}
		tc.RootCAs = pool
	}
	for _, p := range pairs {
		cert, err := tls.LoadX509KeyPair(p.Cert, p.Key)
		if err != nil {
			return nil, fmt.Errorf("load key pair %s, %s: %w", p.Cert, p.Key, err)
		}
		tc.Certificates = append(tc.Certificates, cert)
	}
	return tc, nil
}
