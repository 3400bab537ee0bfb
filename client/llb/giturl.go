package llb

import (
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"

	"github.com/kilnbuild/kiln/internal/giturl"
)

// ErrNotGit is returned for strings that don't name a git repository.
var ErrNotGit = giturl.ErrNotGit

// GitRepo is a repository as build contexts and ADD name it: a URL whose
// fragment and query say what to take of it.
type GitRepo struct {
	Remote        string
	Ref           string
	SubDir        string
	Checksum      string
	MTime         string // "", checkout or commit
	KeepGitDir    *bool  // nil if not said
	Submodules    *bool
	FetchByCommit bool

	// LooksLocal is set for the old form "github.com/user/repo", which may as
	// well be a path.
	LooksLocal bool
}

// ParseGitRepo parses s. The error is ErrNotGit if s is something else, such
// as a path or the URL of a file; any other error is about a repository that is
// named wrongly.
func ParseGitRepo(s string) (*GitRepo, error) {
	g, local, err := parseRepoURL(s)
	if err != nil {
		return nil, err
	}
	r := &GitRepo{Remote: g.Remote, Ref: g.Ref, SubDir: g.Subdir, LooksLocal: local}
	if local {
		_, r.Remote, _ = strings.Cut(g.Remote, "://")
	}
	for key, values := range g.Query {
		if err := r.setQuery(key, values); err != nil {
			return nil, fmt.Errorf("git URL %s: %w", g.Remote, err)
		}
	}
	if err := r.setNamedRef(g.Query); err != nil {
		return nil, fmt.Errorf("git URL %s: %w", g.Remote, err)
	}
	return r, nil
}

func parseRepoURL(s string) (_ *giturl.URL, local bool, _ error) {
	switch {
	case strings.HasPrefix(s, "./"), strings.HasPrefix(s, "../"):
		return nil, false, fmt.Errorf("%w: %q is a path", ErrNotGit, s)
	case strings.HasPrefix(s, "github.com/"):
		u, err := url.Parse(s)
		if err != nil {
			return nil, false, fmt.Errorf("%w: %w", ErrNotGit, err)
		}
		u.Scheme = "https"
		return giturl.Of(u), true, nil
	}
	g, err := giturl.Parse(s)
	if err != nil {
		return nil, false, err
	}
	if (g.Scheme == "http" || g.Scheme == "https") && !strings.HasSuffix(g.Path, ".git") {
		return nil, false, fmt.Errorf("%w: the path of %q doesn't end in .git", ErrNotGit, s)
	}
	return g, false, nil
}

// setQuery takes in every parameter but tag and branch.
func (r *GitRepo) setQuery(key string, values []string) error {
	if len(values) > 1 {
		return fmt.Errorf("query %q has multiple values", key)
	}
	v := ""
	if len(values) == 1 {
		v = values[0]
	}
	flag := key == "submodules" || key == "keep-git-dir" || key == "fetch-by-commit"
	if v == "" && !flag {
		return fmt.Errorf("query %q has no value", key)
	}
	if flag {
		return r.setFlag(key, v)
	}
	switch key {
	case "ref":
		return setOnce("ref", &r.Ref, v)
	case "subdir":
		return setOnce("subdir", &r.SubDir, v)
	case "checksum", "commit":
		return setOnce("checksum", &r.Checksum, v)
	case "mtime":
		if v != "checkout" && v != "commit" {
			return fmt.Errorf("invalid mtime value: %q (must be \"checkout\" or \"commit\")", v)
		}
		r.MTime = v
	case "tag", "branch":
	default:
		return fmt.Errorf("unexpected query %q", key)
	}
	return nil
}

func (r *GitRepo) setFlag(key, v string) error {
	on := true
	if v != "" {
		var err error
		if on, err = strconv.ParseBool(v); err != nil {
			return fmt.Errorf("invalid %s value: %q", key, v)
		}
	}
	switch key {
	case "submodules":
		r.Submodules = &on
	case "keep-git-dir":
		r.KeepGitDir = &on
	case "fetch-by-commit":
		r.FetchByCommit = on
	}
	return nil
}

// setNamedRef takes in the parameters tag and branch, which are refs in full.
func (r *GitRepo) setNamedRef(query url.Values) error {
	tag, branch := query.Get("tag"), query.Get("branch")
	if tag != "" && branch != "" {
		return errors.New("branch conflicts with tag")
	}
	for prefix, name := range map[string]string{"refs/tags/": tag, "refs/heads/": branch} {
		if name == "" {
			continue
		}
		if !strings.HasPrefix(name, prefix) {
			name = prefix + name
		}
		if err := setOnce("ref", &r.Ref, name); err != nil {
			return err
		}
	}
	return nil
}

func setOnce(what string, field *string, v string) error {
	if *field != "" && *field != v {
		return fmt.Errorf("%s conflicts: %q vs %q", what, *field, v)
	}
	*field = v
	return nil
}
