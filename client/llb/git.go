package llb

import (
	"path"
	"strings"

	"github.com/kilnbuild/kiln/internal/giturl"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/apicaps"
)

// GitOption is an option of Git.
type GitOption interface{ applyGit(*source) }

type gitOption func(*source)

func (o gitOption) applyGit(s *source) { o(s) }

// gitSource is what becomes part of the identifier.
type gitSource struct {
	ref, subdir string
	knownHosts  string
	sshSock     string
}

// Secrets that a daemon looks for when it fetches from git over HTTP.
const (
	GitAuthHeaderKey = "GIT_AUTH_HEADER"
	GitAuthTokenKey  = "GIT_AUTH_TOKEN"
)

// Git is a checkout of a git repository. The url may be of any form that git
// takes; one without a scheme means https. The fragment is "ref:subdir", both
// optional; GitRef and GitSubDir say the same.
//
// Repositories reached over ssh are checked against KnownSSHHosts if given.
func Git(url, fragment string, opts ...GitOption) State {
	remote, err := giturl.Parse(url)
	if err != nil && !strings.Contains(url, "://") {
		remote, err = giturl.Parse("https://" + url)
	}
	if err == nil {
		url = remote.Remote
	}

	s := &source{attrs: map[string]string{}}
	s.git.sshSock = "default"
	s.set(pb.AttrAuthHeaderSecret, GitAuthHeaderKey)
	s.set(pb.AttrAuthTokenSecret, GitAuthTokenKey)
	s.set(pb.AttrFullRemoteURL, url, pb.CapSourceGitFullURL)
	if ref, subdir, _ := strings.Cut(fragment, ":"); fragment != "" {
		s.git.ref = ref
		s.git.subdir = strings.TrimPrefix(path.Join("/", subdir), "/")
	}
	for _, o := range opts {
		o.applyGit(s)
	}
	if err != nil {
		s.fail(err)
		return s.state(pb.CapSourceGit)
	}

	// The scheme is left out: however a repository is reached, it is the same.
	s.id = "git://" + remote.Host + path.Join("/", remote.Path)
	if s.git.ref != "" || s.git.subdir != "" {
		s.id += "#" + s.git.ref
	}
	if s.git.subdir != "" {
		s.id += ":" + s.git.subdir
	}
	if remote.Scheme == "ssh" {
		s.set(pb.AttrKnownSSHHosts, s.git.knownHosts)
		s.set(pb.AttrMountSSHSock, s.git.sshSock)
		s.constraints.need(pb.CapSourceGitKnownSSHHosts, pb.CapSourceGitMountSSHSock)
	}
	return s.state(pb.CapSourceGit)
}

// GitRef is the branch, tag or commit to check out.
func GitRef(ref string) GitOption { return gitOption(func(s *source) { s.git.ref = ref }) }

// GitSubDir takes only a directory of the repository.
func GitSubDir(dir string) GitOption { return gitOption(func(s *source) { s.git.subdir = dir }) }

// KeepGitDir keeps the .git directory.
func KeepGitDir() GitOption { return gitFlag(pb.AttrKeepGitDir, pb.CapSourceGitKeepDir) }

// GitSkipSubmodules leaves submodules out.
func GitSkipSubmodules() GitOption {
	return gitFlag(pb.AttrGitSkipSubmodules, pb.CapSourceGitSkipSubmodules)
}

// GitFetchByCommit fetches the commit given by GitChecksum whatever the remote
// says of the ref now.
func GitFetchByCommit() GitOption {
	return gitFlag(pb.AttrGitFetchByCommit, pb.CapSourceGitFetchByCommit)
}

// GitCheckoutBundle makes a file "bundle" instead of a work tree.
func GitCheckoutBundle() GitOption {
	return gitFlag(pb.AttrGitCheckoutBundle, pb.CapSourceGitCheckoutBundle)
}

// GitAdvice lets git print its advice.
func GitAdvice() GitOption {
	return gitOption(func(s *source) { s.set(pb.AttrGitAdvice, "true") })
}

// GitChecksum is the commit, or its beginning, that the ref must be.
func GitChecksum(commit string) GitOption {
	return gitOption(func(s *source) { s.set(pb.AttrGitChecksum, commit, pb.CapSourceGitChecksum) })
}

// GitMTime sets the times of files: "checkout" or "commit".
func GitMTime(policy string) GitOption {
	return gitOption(func(s *source) { s.set(pb.AttrGitMTime, policy, pb.CapSourceGitMTime) })
}

// GitBundle takes the history from a bundle, a blob locator with a digest. The
// session and store say where an OCI layout locator is found; both may be "".
func GitBundle(locator, sessionID, storeID string) GitOption {
	return gitOption(func(s *source) {
		s.set(pb.AttrGitBundle, locator, pb.CapSourceGitBundle)
		s.setStore(sessionID, storeID)
	})
}

// KnownSSHHosts adds lines to the known hosts of ssh.
func KnownSSHHosts(lines string) GitOption {
	return gitOption(func(s *source) { s.git.knownHosts += strings.TrimSuffix(lines, "\n") + "\n" })
}

// MountSSHSock is the id of the client's ssh agent; the default is "default".
func MountSSHSock(id string) GitOption {
	return gitOption(func(s *source) {
		if id != "" {
			s.git.sshSock = id
		}
	})
}

func gitFlag(attr string, c apicaps.CapID) GitOption {
	return gitOption(func(s *source) { s.set(attr, "true", c) })
}

// AuthTokenSecret names the secret that holds a token.
func AuthTokenSecret(name string) GitOption {
	return gitOption(func(s *source) { s.set(pb.AttrAuthTokenSecret, name, pb.CapSourceGitHTTPAuth) })
}

// AuthOption is an option of Git and of HTTP.
type AuthOption interface {
	GitOption
	HTTPOption
}

type authHeaderSecret string

func (name authHeaderSecret) applyGit(s *source) {
	s.set(pb.AttrAuthHeaderSecret, string(name), pb.CapSourceGitHTTPAuth)
}

func (name authHeaderSecret) applyHTTP(s *source) {
	s.set(pb.AttrHTTPAuthHeaderSecret, string(name), pb.CapSourceHTTPAuth)
}

// AuthHeaderSecret names the secret that holds an Authorization header.
func AuthHeaderSecret(name string) AuthOption { return authHeaderSecret(name) }
