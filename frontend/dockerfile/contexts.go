package dockerfile

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"path"
	"regexp"
	"strconv"

	"github.com/kilnbuild/kiln/client/llb"
	"github.com/kilnbuild/kiln/frontend"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
)

// buildContext is where ADD and COPY take files from by default.
type buildContext struct {
	state      *llb.State // nil: a directory of the client
	dockerfile *llb.State // where the Dockerfile is; nil: a directory of the client
	filename   string

	local           string // names of the client's directories
	dockerfileLocal string

	source   *llb.State   // the download that state is made of, if it is one
	download frontend.Ref // of an http context
	archive  bool         // the download is one
}

const httpContextFile = "context"

var httpURL = regexp.MustCompile(`^https?://`)

// openContext finds out what the main context is.
func (b *build) openContext(ctx context.Context) error {
	opts := b.cfg.opts
	c := buildContext{local: "context", dockerfileLocal: "dockerfile", filename: b.cfg.filename}
	if v, ok := opts["contextkey"]; ok {
		c.local = v
	}
	forceLocal := false
	if v, ok := opts["dockerfilekey"]; ok {
		c.dockerfileLocal, forceLocal = v, true
	}

	url := opts[c.local]
	repo, err := llb.ParseGitRepo(url)
	switch {
	case err == nil:
		st := b.gitContext(repo, url)
		c.state, c.dockerfile, c.source = &st, &st, &st
	case !errors.Is(err, llb.ErrNotGit):
		return err
	case httpURL.MatchString(url):
		if err := b.openHTTPContext(ctx, &c, url); err != nil {
			return err
		}
	default:
		if err := b.openInputs(&c); err != nil {
			return err
		}
	}
	if forceLocal {
		c.dockerfile = nil
	}
	if dir, ok := opts["contextsubdir"]; ok && c.state != nil {
		st := llb.Scratch().File(llb.Copy(*c.state, dir, "/", &llb.CopyInfo{CopyDirContentsOnly: true}))
		c.state = &st
	}
	b.context = c
	return nil
}

// gitContext is a repository as the main context.
func (b *build) gitContext(repo *llb.GitRepo, url string) llb.State {
	opts := []llb.GitOption{internalName("load git source " + url)}
	if keep, err := strconv.ParseBool(b.cfg.buildArgs["BUILDKIT_CONTEXT_KEEP_GIT_DIR"]); err == nil && keep {
		opts = append(opts, llb.KeepGitDir())
	}
	if b.cfg.buildArgs[epochArg] != "" {
		opts = append(opts, llb.GitMTime("commit"))
	}
	return llb.Git(repo.Remote, "", append(opts, gitOptions(repo, b.cfg.gitAdvice)...)...)
}

// gitOptions are those that the URL of a repository sets.
func gitOptions(repo *llb.GitRepo, advice bool) []llb.GitOption {
	opts := []llb.GitOption{llb.GitRef(repo.Ref)}
	if advice {
		opts = append(opts, llb.GitAdvice())
	}
	if repo.KeepGitDir != nil && *repo.KeepGitDir {
		opts = append(opts, llb.KeepGitDir())
	}
	if repo.SubDir != "" {
		opts = append(opts, llb.GitSubDir(repo.SubDir))
	}
	if repo.Checksum != "" {
		opts = append(opts, llb.GitChecksum(repo.Checksum))
	}
	if repo.Submodules != nil && !*repo.Submodules {
		opts = append(opts, llb.GitSkipSubmodules())
	}
	if repo.MTime != "" {
		opts = append(opts, llb.GitMTime(repo.MTime))
	}
	if repo.FetchByCommit {
		opts = append(opts, llb.GitFetchByCommit())
	}
	return opts
}

// openHTTPContext downloads url. An archive is the context; anything else is
// the Dockerfile.
func (b *build) openHTTPContext(ctx context.Context, c *buildContext, url string) error {
	st := llb.HTTP(url, llb.Filename(httpContextFile), internalName("load remote build context"))
	ref, _, err := b.solve(ctx, st)
	if err != nil {
		return fmt.Errorf("failed to resolve httpcontext: %w", err)
	}
	if ref == nil {
		return fmt.Errorf("internal error: the download of %s has no reference", url)
	}
	head, err := ref.ReadFile(ctx, httpContextFile, &gwpb.FileRange{Length: 1024})
	if err != nil {
		return fmt.Errorf("failed to read downloaded context: %w", err)
	}
	c.source, c.download, c.archive = &st, ref, isArchive(head)
	if c.archive {
		st = llb.Scratch().File(llb.Copy(st, path.Join("/", httpContextFile), "/", &llb.CopyInfo{AttemptUnpack: true}))
	} else {
		c.filename = httpContextFile
	}
	c.state, c.dockerfile = &st, &st
	return nil
}

// openInputs takes context and Dockerfile from the inputs of the request.
func (b *build) openInputs(c *buildContext) error {
	for name, field := range map[string]**llb.State{"context": &c.state, c.dockerfileLocal: &c.dockerfile} {
		def, ok := b.req.Inputs[name]
		if !ok {
			continue
		}
		st, err := llb.FromDefinition(def)
		if err != nil {
			return fmt.Errorf("frontend input %s: %w", name, err)
		}
		*field = &st
	}
	return nil
}

// mainContext is the main context, reduced to the paths that are used.
func (b *build) mainContext(ctx context.Context, used *pathSet) (llb.State, error) {
	if b.context.state != nil {
		return *b.context.state, nil
	}
	excludes, err := b.ignorePatterns(ctx)
	if err != nil {
		return llb.State{}, err
	}
	local := b.context.local
	return llb.Local(local,
		llb.SessionID(b.session(local)),
		llb.ExcludePatterns(excludes),
		llb.SharedKeyHint(local),
		internalName("load build context"),
		llb.FollowPaths(used.list()),
	), nil
}

// isArchive reports whether a file that begins with head is a tar archive,
// possibly compressed.
func isArchive(head []byte) bool {
	for _, magic := range []string{
		"BZh",              // bzip2
		"\x1f\x8b\x08",     // gzip
		"\xfd7zXZ\x00",     // xz
		"\x28\xb5\x2f\xfd", // zstd
	} {
		if bytes.HasPrefix(head, []byte(magic)) {
			return true
		}
	}
	// zstd may begin with skippable frames.
	if len(head) >= 8 && binary.LittleEndian.Uint32(head)&^0xf == 0x184d2a50 {
		return true
	}
	_, err := tar.NewReader(bytes.NewReader(head)).Next()
	return err == nil
}

// pathSet is a set of absolute paths within a context. Stages share one with
// their base.
type pathSet struct {
	paths map[string]bool
}

func (s *pathSet) add(p string) {
	if s.paths == nil {
		s.paths = map[string]bool{}
	}
	s.paths[path.Join("/", p)] = true
}

// list returns the paths to transfer, relative and sorted; none means all.
func (s *pathSet) list() []string {
	if s.paths["/"] {
		return nil
	}
	out := make([]string, 0, len(s.paths))
	for p := range s.paths {
		out = append(out, cleanRel(p))
	}
	return sorted(out)
}
