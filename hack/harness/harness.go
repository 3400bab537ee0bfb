// Package harness starts what end-to-end tests and benchmarks need beside the
// daemon under test: a registry with a base image, and other processes.
package harness

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/kilnbuild/kiln/hack/testimage"
)

// Registry is Debian's docker-registry on a free port of loopback.
type Registry struct {
	Host string // host:port
	cmd  *exec.Cmd
}

// StartRegistry runs a registry that keeps its data under dir and waits until
// it answers.
func StartRegistry(dir string) (*Registry, error) {
	host, err := FreeAddress()
	if err != nil {
		return nil, err
	}
	conf := filepath.Join(dir, "registry.yml")
	text := fmt.Sprintf("version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: %s\n  delete:\n    enabled: true\nhttp:\n  addr: %s\n",
		filepath.Join(dir, "registry"), host)
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		return nil, err
	}
	r := &Registry{Host: host, cmd: exec.Command("docker-registry", "serve", conf)}
	if err := r.cmd.Start(); err != nil {
		return nil, fmt.Errorf("%w: install the package docker-registry", err)
	}
	if err := WaitFor(10*time.Second, func() error {
		resp, err := http.Get("http://" + host + "/v2/")
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

// Stop ends the registry. Its data stays.
func (r *Registry) Stop() {
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

// FreeAddress is an address on loopback that nobody listens on.
func FreeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// WaitFor asks again and again until ok returns nil, for what another process
// is about to do. After d it returns ok's last error.
func WaitFor(d time.Duration, ok func() error) error {
	deadline := time.Now().Add(d)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ok()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		<-tick.C
	}
}
