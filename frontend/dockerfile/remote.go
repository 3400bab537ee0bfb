package dockerfile

import (
	"errors"
	"fmt"
	"net/url"
	"path"
	"strings"

	"github.com/kilnbuild/kiln/client/llb"
	"github.com/opencontainers/go-digest"
)

// isRemote reports whether src is a URL of a file or of a repository over HTTP.
func isRemote(src string) bool {
	return strings.HasPrefix(src, "http://") || strings.HasPrefix(src, "https://")
}

// isRepo reports whether src is a repository and can't be a path.
func isRepo(src string) bool {
	repo, err := llb.ParseGitRepo(src)
	return err == nil && !repo.LooksLocal
}

// checkChecksum refuses a checksum for what has none.
func (t *transfer) checkChecksum() error {
	switch sources := t.params.SourcePaths; {
	case t.checksum == "":
		return nil
	case len(sources) != 1:
		return errors.New("checksum can't be specified for multiple sources")
	case !isRemote(sources[0]) && !isRepo(sources[0]):
		return errors.New("checksum requires HTTP(S) or Git sources")
	}
	return nil
}

// addURL copies a download.
func (t *transfer) addURL(src string) error {
	if t.name != "ADD" {
		return errors.New("source can't be a URL for COPY")
	}
	dgst, err := parseChecksum(t.checksum)
	if err != nil {
		return err
	}
	name := downloadName(src)
	st := llb.HTTP(src, llb.Filename(name), llb.WithCustomName(t.title), llb.Checksum(dgst), description(""), t.location(t.command.Location()))
	// Downloads stay packed unless asked otherwise.
	t.addAction(st, name, llb.CopyInfo{AttemptUnpack: t.unpack != nil && *t.unpack})
	return nil
}

func parseChecksum(s string) (digest.Digest, error) {
	if s == "" {
		return "", nil
	}
	dgst, err := digest.Parse(s)
	if err != nil {
		return "", fmt.Errorf("checksum %q: %w", s, err)
	}
	return dgst, nil
}

// downloadName is the name of a downloaded file: the last part of its URL.
func downloadName(src string) string {
	if u, err := url.Parse(src); err == nil {
		if base := path.Base(u.Path); base != "." && base != "/" {
			return base
		}
	}
	return "__unnamed__"
}

// addGit copies a checkout.
func (t *transfer) addGit(repo *llb.GitRepo) error {
	if t.name != "ADD" {
		return errors.New("source can't be a git ref for COPY")
	}
	src := *repo
	src.MTime = "" // times are those of the copy
	if keep := t.keepGitDir; keep != nil {
		if src.KeepGitDir != nil && *src.KeepGitDir != *keep {
			return errors.New("inconsistent keep-git-dir configuration")
		}
		src.KeepGitDir = keep
	}
	if t.checksum != "" {
		if src.Checksum != "" && src.Checksum != t.checksum {
			return fmt.Errorf("checksum mismatch %q != %q", t.checksum, src.Checksum)
		}
		src.Checksum = t.checksum
	}
	opts := append(gitOptions(&src, t.cfg.gitAdvice), llb.WithCustomName(t.title))
	opts = append(opts, t.location(t.command.Location()))
	t.addAction(llb.Git(src.Remote, "", opts...), "/", llb.CopyInfo{})
	return nil
}
