// Package sessiontest connects sessions of clients for tests of what asks them.
package sessiontest

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/secrets"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
	"golang.org/x/sys/unix"
)

// Manager returns a manager of sessions.
func Manager(t testing.TB) *session.Manager {
	t.Helper()
	sm, err := session.NewManager()
	if err != nil {
		t.Fatal(err)
	}
	return sm
}

// Connect connects a client that offers the services to sm until the test ends,
// and returns the session's id. The manager knows the session when it returns.
// Clients with the same sharedKey share what they transferred.
func Connect(t testing.TB, sm *session.Manager, sharedKey string, services ...session.Attachable) string {
	t.Helper()
	s, err := session.NewSession(t.Context(), sharedKey)
	if err != nil {
		t.Fatal(err)
	}
	for _, service := range services {
		s.Allow(service)
	}
	var running sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	dial := func(ctx context.Context, _ string, meta map[string][]string) (net.Conn, error) {
		client, daemon, err := pair()
		if err != nil {
			return nil, err
		}
		running.Go(func() {
			if err := sm.HandleConn(ctx, daemon, meta); err != nil && !errors.Is(err, context.Canceled) {
				t.Logf("session: %v", err)
			}
		})
		return client, nil
	}
	running.Go(func() { s.Run(ctx, dial) }) // fails at its end, whose cause is Close
	t.Cleanup(func() {
		s.Close()
		cancel()
		running.Wait()
	})
	wait, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	if _, err = sm.Get(wait, s.ID(), false); err != nil {
		t.Fatal(err)
	}
	return s.ID()
}

// pair returns both ends of a connection in the kernel, so that a transfer costs
// what it costs between processes.
func pair() (net.Conn, net.Conn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "session")
		conn, fileErr := net.FileConn(f) // a duplicate
		f.Close()
		conns[i], err = conn, errors.Join(err, fileErr)
	}
	return conns[0], conns[1], err
}

// Secrets are a client's secrets by id.
type Secrets map[string]string

// GetSecret implements [secrets.SecretStore].
func (s Secrets) GetSecret(_ context.Context, id string) ([]byte, error) {
	if text, ok := s[id]; ok {
		return []byte(text), nil
	}
	return nil, secrets.ErrNotFound
}

// Service offers the secrets in a session.
func (s Secrets) Service() session.Attachable { return secretsprovider.NewSecretProvider(s) }
