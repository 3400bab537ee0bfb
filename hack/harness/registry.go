package harness

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/kilnbuild/kiln/hack/testimage"
	"golang.org/x/crypto/bcrypt"
)

// Registry is Debian's docker-registry on a free port of loopback.
type Registry struct {
	Host string // host:port
	Options
	client *http.Client
	cmd    *exec.Cmd
}

// Options are how a registry is reached and by whom; the zero value is plain
// HTTP for everybody.
type Options struct {
	TLS            *CA  // speaks HTTPS with a certificate of it
	ClientCerts    bool // clients must have one of it as well
	User, Password string
}

// StartRegistry runs a registry for everybody that keeps its data under dir and
// waits until it answers.
func StartRegistry(dir string) (*Registry, error) { return Options{}.Start(dir) }

// Start runs a registry that keeps its data under dir and waits until it
// answers.
func (o Options) Start(dir string) (*Registry, error) {
	host, err := freeAddress()
	if err != nil {
		return nil, err
	}
	r := &Registry{Host: host, Options: o, client: &http.Client{Transport: &http.Transport{}}}
	text, err := r.config(dir)
	if err != nil {
		return nil, fmt.Errorf("configure registry: %w", err)
	}
	conf := filepath.Join(dir, "registry.yml")
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		return nil, err
	}
	r.cmd = exec.Command("docker-registry", "serve", conf)
	if err := r.cmd.Start(); err != nil {
		return nil, fmt.Errorf("%w: install the package docker-registry", err)
	}
	if err := WaitFor(Patience, func() error {
		resp, err := r.Get("")
		if err != nil {
			return err
		}
		return resp.Body.Close()
	}); err != nil {
		r.Stop()
		return nil, fmt.Errorf("registry: %w", err)
	}
	return r, nil
}

// config is the registry's configuration, in YAML. It prepares the client too.
func (r *Registry) config(dir string) (string, error) {
	var out strings.Builder
	fmt.Fprintf(&out, "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: %s\n  delete:\n    enabled: true\nhttp:\n  addr: %s\n",
		filepath.Join(dir, "registry"), r.Host)
	if r.TLS != nil {
		pair, err := r.TLS.Issue("registry")
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&out, "  tls:\n    certificate: %s\n    key: %s\n", pair.Cert, pair.Key)
		if r.ClientCerts {
			fmt.Fprintf(&out, "    clientcas:\n      - %s\n", r.TLS.File)
		}
		if err := r.trust(); err != nil {
			return "", err
		}
	}
	if r.User != "" {
		hash, err := bcrypt.GenerateFromPassword([]byte(r.Password), bcrypt.MinCost)
		if err != nil {
			return "", err
		}
		path := filepath.Join(dir, "htpasswd")
		if err := os.WriteFile(path, []byte(r.User+":"+string(hash)+"\n"), 0o600); err != nil {
			return "", err
		}
		fmt.Fprintf(&out, "auth:\n  htpasswd:\n    realm: test\n    path: %s\n", path)
	}
	return out.String(), nil
}

// trust makes the client one that the registry talks to.
func (r *Registry) trust() error {
	pair, err := r.TLS.Issue("reader")
	if err != nil {
		return err
	}
	cert, err := tls.LoadX509KeyPair(pair.Cert, pair.Key)
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AddCert(r.TLS.cert)
	r.client.Transport = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}}}
	return nil
}

// Get asks the registry for a path below /v2/, as somebody who may. accept are
// media types.
func (r *Registry) Get(path string, accept ...string) (*http.Response, error) {
	scheme := "http"
	if r.TLS != nil {
		scheme = "https"
	}
	req, err := http.NewRequest(http.MethodGet, scheme+"://"+r.Host+"/v2/"+path, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", strings.Join(accept, ", "))
	if r.User != "" {
		req.SetBasicAuth(r.User, r.Password)
	}
	return r.client.Do(req)
}

// Stop ends the registry. Its data stays.
func (r *Registry) Stop() {
	r.client.CloseIdleConnections()
	r.cmd.Process.Kill() // an error means that it has ended
	r.cmd.Wait()         // likewise
}

// PushBusybox puts the busybox base image into the registry and returns its
// layout in dir and its reference.
func (r *Registry) PushBusybox(dir string) (testimage.Layout, string, error) {
	img, err := testimage.Busybox()
	if err != nil {
		return testimage.Layout{}, "", err
	}
	l, err := img.Write(filepath.Join(dir, "base"))
	if err != nil {
		return l, "", err
	}
	return l, r.Host + "/library/busybox:latest", l.Push(r.Host, "library/busybox", "latest")
}
