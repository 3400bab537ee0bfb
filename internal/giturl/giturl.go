// Package giturl parses URLs of git repositories, as callers, the Dockerfile
// frontend and the git source write them.
package giturl

import (
	"errors"
	"fmt"
	"net/url"
	"path"
	"regexp"
	"strings"
)

// ErrNotGit is returned for strings that don't name a git repository.
var ErrNotGit = errors.New("not a git repository URL")

// URL is a parsed URL of a git repository.
type URL struct {
	Scheme string // http, https, ssh or git
	User   *url.Userinfo
	Host   string
	Path   string
	Remote string // what git is given: without query and fragment
	SCP    bool   // of the form user@host:path, which means ssh

	Query       url.Values
	Ref, Subdir string // from the fragment, "#ref:subdir"
}

var (
	schemePattern = regexp.MustCompile(`^([a-zA-Z0-9]+)://`)
	scpPattern    = regexp.MustCompile(`^([a-zA-Z0-9-_]+)@([a-zA-Z0-9-.]+):(.*?)(?:\?(.*?))?(?:#(.*))?$`)
)

// Parse parses a URL with a scheme or of the form user@host:path.
func Parse(s string) (*URL, error) {
	if m := schemePattern.FindStringSubmatch(s); m != nil {
		switch strings.ToLower(m[1]) {
		case "http", "https", "ssh", "git":
		default:
			return nil, fmt.Errorf("%w: git has no protocol %q", ErrNotGit, m[1])
		}
		u, err := url.Parse(s)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrNotGit, err)
		}
		return Of(u), nil
	}
	m := scpPattern.FindStringSubmatch(s)
	if m == nil {
		return nil, fmt.Errorf("%w: %q", ErrNotGit, s)
	}
	query, err := url.ParseQuery(m[4])
	if err != nil {
		return nil, fmt.Errorf("%w: query of %q: %w", ErrNotGit, s, err)
	}
	g := &URL{Scheme: "ssh", User: url.User(m[1]), Host: m[2], Path: m[3], Query: query, SCP: true}
	g.Remote = g.User.String() + "@" + g.Host + ":" + g.Path
	g.setFragment(m[5])
	return g, nil
}

// Of is the repository at u.
func Of(u *url.URL) *URL {
	remote := *u
	remote.RawQuery, remote.Fragment, remote.RawFragment = "", "", ""
	g := &URL{Scheme: u.Scheme, User: u.User, Host: u.Host, Path: u.Path, Query: u.Query(), Remote: remote.String()}
	g.setFragment(u.Fragment)
	return g
}

func (g *URL) setFragment(fragment string) {
	ref, subdir, _ := strings.Cut(fragment, ":")
	g.Ref, g.Subdir = ref, strings.TrimPrefix(path.Join("/", subdir), "/")
}
