package git

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/url"
	"path"
	"regexp"
	"strings"
	"unicode"

	"github.com/kilnbuild/kiln/internal/giturl"
	"github.com/moby/buildkit/solver/pb"
)

// spec is what one op asks for.
type spec struct {
	scheme string
	host   string // with its port
	url    string // what git is given: it holds no password
	basic  string // Authorization header that the URL's own password stands for

	ref      string // as it was asked for; "" is the default branch
	subdir   string // "" is everything
	checksum string // what the commit's id starts with

	keepDir        bool
	skipSubmodules bool
	commitTimes    bool
	byCommit       bool
	advice         bool

	headerSecret, tokenSecret string
	agent                     string // id of the SSH agent
	knownHosts                string
}

// parseSpec reads an identifier without its scheme, host/path#ref:subdir, and
// the attributes that it comes with (LLB-099 to -106).
func parseSpec(identifier string, attrs map[string]string) (spec, error) {
	u, err := parseURL(identifier)
	if err != nil {
		return spec{}, err
	}
	ref, subdir := u.Ref, u.Subdir
	if full, ok := attrs[pb.AttrFullRemoteURL]; ok {
		if u, err = fullURL(full, u); err != nil {
			return spec{}, err
		}
	}
	s := spec{
		ref: ref, subdir: subdir, checksum: attrs[pb.AttrGitChecksum],
		keepDir:        attrs[pb.AttrKeepGitDir] == "true",
		skipSubmodules: attrs[pb.AttrGitSkipSubmodules] == "true",
		byCommit:       attrs[pb.AttrGitFetchByCommit] == "true",
		advice:         attrs[pb.AttrGitAdvice] == "true",
		headerSecret:   attrs[pb.AttrAuthHeaderSecret],
		tokenSecret:    attrs[pb.AttrAuthTokenSecret],
		agent:          attrs[pb.AttrMountSSHSock],
		knownHosts:     attrs[pb.AttrKnownSSHHosts],
	}
	switch v := attrs[pb.AttrGitMTime]; v {
	case "", "checkout":
	case "commit":
		s.commitTimes = true
	default:
		return spec{}, fmt.Errorf("%s: %q is neither checkout nor commit", pb.AttrGitMTime, v)
	}
	if err := s.setURL(u); err != nil {
		return spec{}, err
	}
	return s, s.check()
}

// parseURL reads a URL whose scheme may be missing: then it is https.
func parseURL(s string) (*giturl.URL, error) {
	u, err := giturl.Parse(s)
	if err != nil && !strings.Contains(s, "://") {
		u, err = giturl.Parse("https://" + s)
	}
	return u, err
}

// fullURL is how to reach the repository that id names, which has to be the
// same one.
func fullURL(full string, id *giturl.URL) (*giturl.URL, error) {
	u, err := parseURL(full)
	if err != nil {
		return nil, fmt.Errorf("%s can't be parsed", pb.AttrFullRemoteURL) // the error would show a password
	}
	place := func(u *giturl.URL) string {
		return strings.ToLower(u.Host) + strings.TrimSuffix(path.Join("/", u.Path), ".git")
	}
	if place(u) != place(id) {
		return nil, fmt.Errorf("%s does not match the source's identifier: it is of another repository", pb.AttrFullRemoteURL)
	}
	p := path.Join("/", id.Path)
	if u.SCP && !strings.HasPrefix(u.Path, "/") {
		p = strings.TrimPrefix(p, "/")
	}
	u.Path = p
	return u, nil
}

// setURL keeps what may be shown and stored of u apart from what may not.
func (s *spec) setURL(u *giturl.URL) error {
	s.scheme, s.host = strings.ToLower(u.Scheme), u.Host
	if u.Host == "" {
		return errors.New("the URL names no host")
	}
	user := ""
	if u.User != nil {
		user = u.User.Username()
	}
	// What starts with a dash could be taken for an option, by git or by ssh.
	for _, part := range []string{u.Host, user, strings.TrimPrefix(u.Path, "/")} {
		if strings.HasPrefix(part, "-") || strings.ContainsFunc(part, unicode.IsControl) {
			return fmt.Errorf("invalid git URL: %q", part)
		}
	}
	switch {
	case u.SCP:
		s.url = user + "@" + u.Host + ":" + u.Path
		return nil
	case s.scheme == "ssh" && user != "":
		s.url = (&url.URL{Scheme: s.scheme, User: url.User(user), Host: u.Host, Path: u.Path}).String()
		return nil
	}
	s.url = (&url.URL{Scheme: s.scheme, Host: u.Host, Path: u.Path}).String()
	if s.overHTTP() && u.User != nil {
		password, _ := u.User.Password()
		s.basic = "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
	}
	return nil
}

func (s *spec) overHTTP() bool { return s.scheme == "http" || s.scheme == "https" }

var hexPattern = regexp.MustCompile("^[a-fA-F0-9]+$")

// check refuses what can't be, before anybody is asked.
func (s *spec) check() error {
	if s.ref != "" && !validRef(s.ref) {
		return fmt.Errorf("invalid git ref %q", s.ref)
	}
	if s.checksum != "" && !hexPattern.MatchString(s.checksum) {
		return fmt.Errorf("invalid checksum %s for Git URL, expected hex commit hash", s.checksum)
	}
	if isCommit(s.ref) {
		if !strings.HasPrefix(s.ref, s.checksum) {
			return fmt.Errorf("expected checksum to match %s, got %s", s.checksum, s.ref)
		}
		return nil
	}
	if s.byCommit && s.checksum == "" {
		return errors.New("fetch-by-commit requires a checksum or a commit SHA ref")
	}
	if s.byCommit && !isCommit(s.checksum) {
		return fmt.Errorf("fetch-by-commit requires a full commit SHA checksum, got %q", s.checksum)
	}
	return nil
}

// validRef says whether git could have a ref of that name. No such name is taken
// for an option, a pattern or a range.
func validRef(ref string) bool {
	if strings.HasPrefix(ref, "-") || strings.HasSuffix(ref, "/") || strings.HasSuffix(ref, ".") ||
		strings.Contains(ref, "..") || strings.Contains(ref, "@{") || strings.Contains(ref, "//") {
		return false
	}
	for part := range strings.SplitSeq(ref, "/") {
		if strings.HasPrefix(part, ".") || strings.HasSuffix(part, ".lock") {
			return false
		}
	}
	return !strings.ContainsFunc(ref, func(r rune) bool {
		return unicode.IsControl(r) || strings.ContainsRune(` ~^:?*[\`, r)
	})
}

// isCommit says whether s is an object's id in full.
func isCommit(s string) bool {
	return (len(s) == 40 || len(s) == 64) && strings.Trim(s, "0123456789abcdef") == ""
}

// key identifies a checkout of what object is, which was found as ref. It is
// upstream's, byte for byte (LLB-156).
func (s *spec) key(object, ref string) string {
	key := object
	if s.keepDir {
		key += ".git#" + ref
	}
	if s.subdir != "" {
		key += ":" + s.subdir
	}
	if s.skipSubmodules {
		key += "(skip-submodules)"
	}
	if s.commitTimes {
		key += "(mtime=commit)"
	}
	return key
}

// scope is the beginning of the URLs for which the credentials of the repository
// are: its own, or all of GitHub, where tokens are for many.
func (s *spec) scope() string {
	for _, prefix := range []string{"https://github.com/", "https://www.github.com/"} {
		if strings.HasPrefix(s.url, prefix) {
			return prefix
		}
	}
	return s.url
}
