package git

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/kilnbuild/kiln/internal/cleanup"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/secrets"
)

// access is what a client lends for talking to a repository, in memory only. A
// nil one lends nothing.
type access struct {
	settings []setting
	env      []string
	options  string   // of ssh
	header   string   // that goes to the repository over HTTP; "" is none
	moved    bool     // another URL of the same host stands for the repository's
	secrets  []string // not to be shown
	release  func() error
}

// openAccess asks the sessions of g.
func (s *Source) openAccess(ctx context.Context, sp *spec, g session.Group) (_ *access, err error) {
	if err := s.checkGit(ctx); err != nil {
		return nil, err
	}
	a := &access{}
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	if sp.overHTTP() {
		err = s.addHeader(ctx, a, sp, g)
	} else if sp.scheme == "ssh" {
		err = s.addSSH(ctx, &undo, a, sp, g)
	}
	if err != nil {
		return nil, err
	}
	a.release = undo.Keep()
	return a, nil
}

// addHeader makes git send the first of the client's secrets that there is, or
// what the URL has, to the repository (LLB-101).
func (s *Source) addHeader(ctx context.Context, a *access, sp *spec, g session.Group) error {
	header := sp.basic
	for _, name := range sp.secretNames() {
		value, ok, err := s.secret(ctx, g, name.id)
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		a.secrets = append(a.secrets, value)
		if header = value; name.token {
			header = "basic " + base64.StdEncoding.EncodeToString([]byte("x-access-token:"+value))
		}
		break
	}
	if header == "" {
		return nil
	}
	if strings.ContainsAny(header, "\r\n") {
		return errors.New("the secret for " + sp.url + " has more than one line and can't be a header")
	}
	a.secrets = append(a.secrets, header)
	if _, bare, ok := strings.Cut(header, " "); ok {
		a.secrets = append(a.secrets, bare)
	}
	a.header = header
	a.settings = append(a.settings,
		setting{"http." + sp.scope() + ".extraHeader", "Authorization: " + header},
		setting{"http." + sp.scope() + ".followRedirects", "false"})
	return nil
}

type secretName struct {
	id    string
	token bool
}

// secretNames are looked for in this order.
func (sp *spec) secretNames() (names []secretName) {
	for _, suffix := range []string{"." + sp.host, ""} {
		if sp.headerSecret != "" {
			names = append(names, secretName{sp.headerSecret + suffix, false})
		}
		if sp.tokenSecret != "" {
			names = append(names, secretName{sp.tokenSecret + suffix, true})
		}
	}
	return names
}

// secret is the value of a secret, if a session has it.
func (s *Source) secret(ctx context.Context, g session.Group, id string) (value string, ok bool, err error) {
	if g == nil {
		return "", false, nil
	}
	err = s.opts.Sessions.Any(ctx, g, func(ctx context.Context, _ string, caller session.Caller) error {
		data, err := secrets.GetSecret(ctx, caller, id)
		value = strings.TrimSuffix(string(data), "\n")
		return err
	})
	switch {
	case err == nil:
		return value, true, nil
	case ctx.Err() != nil:
		return "", false, context.Cause(ctx)
	case errors.Is(err, secrets.ErrNotFound), errors.Is(err, session.ErrNoActiveSessions):
		return "", false, nil
	}
	return "", false, fmt.Errorf("get secret %q: %w", id, err)
}

// addSSH makes the client's agent and known hosts those of ssh (LLB-102). They
// are in a file system that is attached nowhere.
func (s *Source) addSSH(ctx context.Context, undo *cleanup.Stack, a *access, sp *spec, g session.Group) error {
	view, err := snapshot.Open([]mount.Mount{{Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "nodev", "noexec", "mode=0700"}}})
	if err != nil {
		return fmt.Errorf("make a file system for ssh: %w", err)
	}
	undo.Add(view.Close)
	// The way by which other processes reach it.
	dir := fmt.Sprintf("/proc/%d/fd/%s", os.Getpid(), filepath.Base(view.Path()))
	if sp.agent != "" {
		stop, err := ops.ForwardAgent(ctx, s.opts.Sessions, g, sp.agent, filepath.Join(view.Path(), "agent"))
		if err != nil {
			return err
		}
		undo.Add(stop)
		a.env = append(a.env, "SSH_AUTH_SOCK="+filepath.Join(dir, "agent"))
	}
	if sp.knownHosts == "" {
		a.options = " -o StrictHostKeyChecking=no -o UserKnownHostsFile=" + os.DevNull
		return nil
	}
	if err := os.WriteFile(filepath.Join(view.Path(), "known_hosts"), []byte(sp.knownHosts), 0o600); err != nil {
		return fmt.Errorf("write known hosts: %w", err)
	}
	a.options = " -o StrictHostKeyChecking=yes -o UserKnownHostsFile=" + filepath.Join(dir, "known_hosts")
	return nil
}

// ssh is the command that git runs. It has no configuration and no keys but
// those of the client's agent, and it asks nobody.
func (a *access) ssh() string {
	c := "ssh -F " + os.DevNull + " -o BatchMode=yes -o IdentityFile=none -o GlobalKnownHostsFile=" + os.DevNull +
		" -o ConnectTimeout=60 -o ServerAliveInterval=30 -o ServerAliveCountMax=4"
	if a != nil {
		c += a.options
	}
	return c
}

// hidden replaces what must not be shown.
func (a *access) hidden() *strings.Replacer {
	if a == nil {
		return strings.NewReplacer()
	}
	var pairs []string
	for _, secret := range a.secrets {
		if secret != "" {
			pairs = append(pairs, secret, "***")
		}
	}
	return strings.NewReplacer(pairs...)
}

func (a *access) close() error {
	if a == nil || a.release == nil {
		return nil
	}
	return a.release()
}
