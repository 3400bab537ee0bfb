package dockerfile

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"

	"github.com/kilnbuild/kiln/client/llb"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/patternmatcher"
	mode "github.com/tonistiigi/dchapes-mode"
)

// transfer is an ADD or COPY.
type transfer struct {
	*step
	name     string // ADD or COPY
	params   instructions.SourcesAndDest
	source   llb.State // of plain paths
	ignored  *patternmatcher.PatternMatcher
	chown    string
	chmod    string
	excludes []string
	link     bool

	parents bool // COPY only

	unpack     *bool // the following ADD only
	keepGitDir *bool
	checksum   string

	dest   string
	perm   *llb.ChmodOpt
	title  string // the vertex's
	action *llb.FileAction
}

// copy copies from the main context, a stage, an image or a named context.
func (st *step) copy(cmd *instructions.CopyCommand) error {
	t := &transfer{
		step: st, name: "COPY", params: cmd.SourcesAndDest, source: st.sources, ignored: st.ignored,
		chown: cmd.Chown, chmod: cmd.Chmod, excludes: cmd.ExcludePatterns, link: cmd.Link, parents: cmd.Parents,
	}
	used := &st.used
	if len(st.command.from) > 0 {
		from := st.command.from[0]
		if !from.ready {
			return fmt.Errorf("cannot copy from stage %q, it needs to be defined before current stage %q", cmd.From, st.stage.name)
		}
		t.source, t.ignored, used = from.state, nil, from.used
	}
	if err := t.do(cmd.String()); err != nil {
		return err
	}
	for _, src := range cmd.SourcePaths {
		used.add(src)
	}
	return nil
}

// add copies from the main context, extracting archives, or from elsewhere.
func (st *step) add(cmd *instructions.AddCommand) error {
	t := &transfer{
		step: st, name: "ADD", params: cmd.SourcesAndDest, source: st.sources, ignored: st.ignored,
		chown: cmd.Chown, chmod: cmd.Chmod, excludes: cmd.ExcludePatterns, link: cmd.Link,
		unpack: cmd.Unpack, keepGitDir: cmd.KeepGitDir, checksum: cmd.Checksum,
	}
	if err := t.do(cmd.String()); err != nil {
		return err
	}
	for _, src := range cmd.SourcePaths {
		if !isRemote(src) && !isRepo(src) {
			st.used.add(src)
		}
	}
	return nil
}

func (t *transfer) do(text string) (err error) {
	s := t.stage
	if t.dest, err = s.destination(t.params.DestPath); err != nil {
		return err
	}
	if err := t.parseChmod(); err != nil {
		return err
	}
	if err := t.checkChecksum(); err != nil {
		return err
	}
	env := s.state.Env()
	name := displayName(text, t.lex, env)
	t.title = s.vertexName(name, s.platform, env)
	for _, src := range t.params.SourcePaths {
		if err := t.addSource(src); err != nil {
			return err
		}
	}
	for _, doc := range t.params.SourceContents {
		if err := t.addDocument(doc); err != nil {
			return err
		}
	}

	opts := []llb.ConstraintsOpt{llb.WithCustomName(t.title), t.location(t.command.Location())}
	if s.noCache {
		opts = append(opts, llb.IgnoreCache)
	}
	if t.link && t.chmod == "" {
		linkName := s.stepName("LINK "+name, s.platform, env)
		s.state = linkOnto(s.state, t.action, t.title, linkName, append(opts, llb.Platform(*s.platform)), opts)
	} else {
		s.state = s.state.File(t.action, opts...)
	}
	s.history(t.historyText(), true)
	return nil
}

// linkOnto does the action on nothing and merges the result onto base, so that
// it needn't be done again when base changes. Both are shown as one step.
func linkOnto(base llb.State, a *llb.FileAction, title, linkName string, copyOpts, mergeOpts []llb.ConstraintsOpt) llb.State {
	group := strings.ToLower(rand.Text())
	copied := llb.Scratch().File(a, append(copyOpts, llb.ProgressGroup(group, title, true))...)
	return base.WithOutput(llb.Merge([]llb.State{base, copied},
		append(mergeOpts, llb.ProgressGroup(group, title, false), llb.WithCustomName(linkName))...))
}

// historyText is the instruction with all words expanded.
func (t *transfer) historyText() string {
	words := []string{t.name}
	if t.parents {
		words = append(words, "--parents")
	}
	if t.chown != "" {
		words = append(words, "--chown="+t.chown)
	}
	if t.chmod != "" {
		words = append(words, "--chmod="+t.chmod)
	}
	words = append(words, t.params.SourcePaths...)
	for _, doc := range t.params.SourceContents {
		words = append(words, "<<"+doc.Path)
	}
	return strings.Join(append(words, t.params.DestPath), " ") + " # buildkit"
}

// parseChmod reads a mode in octal or as chmod takes it.
func (t *transfer) parseChmod() error {
	if t.chmod == "" {
		return nil
	}
	notOctal := fmt.Errorf("invalid chmod parameter: '%v'. it should be octal string and between 0 and 07777", t.chmod)
	n, err := strconv.ParseUint(t.chmod, 8, 32)
	if err == nil {
		if n > 0o7777 {
			return notOctal
		}
		t.perm = &llb.ChmodOpt{Mode: os.FileMode(n)}
		return nil
	}
	if _, err := mode.Parse(t.chmod); err != nil {
		if errors.As(err, new(*strconv.NumError)) {
			return notOctal
		}
		return fmt.Errorf("invalid chmod parameter %q: %w", t.chmod, err)
	}
	t.perm = &llb.ChmodOpt{ModeStr: t.chmod}
	return nil
}

// addAction appends the copy of src, a path of st.
func (t *transfer) addAction(st llb.State, src string, info llb.CopyInfo) {
	info.Mode = t.perm
	info.CreateDestPath = true
	opts := []llb.CopyOption{&info}
	if t.chown != "" {
		opts = append(opts, llb.WithUser(t.chown))
	}
	if len(t.excludes) > 0 {
		opts = append(opts, llb.WithExcludePatterns(t.excludes))
	}
	if t.action == nil {
		t.action = llb.Copy(st, src, t.dest, opts...)
	} else {
		t.action = t.action.Copy(st, src, t.dest, opts...)
	}
}

func (t *transfer) addSource(src string) error {
	repo, err := llb.ParseGitRepo(src)
	switch {
	case err == nil && !repo.LooksLocal:
		return t.addGit(repo)
	case err != nil && !errors.Is(err, llb.ErrNotGit):
		return err
	case isRemote(src):
		return t.addURL(src)
	}
	return t.addPath(src)
}

// addPath copies what a path or pattern names in the context.
func (t *transfer) addPath(src string) error {
	if err := t.lintIgnored(src); err != nil {
		return err
	}
	os := t.stage.platform.OS
	var info llb.CopyInfo
	if t.parents {
		var err error
		if src, info, err = withParents(src, os); err != nil {
			return err
		}
	}
	src, err := resolvePath("/", src, os, false)
	if err != nil {
		return err
	}
	info.FollowSymlinks = true
	info.CopyDirContentsOnly = true
	info.AllowWildcard = true
	info.AllowEmptyWildcard = true
	info.AttemptUnpack = t.name == "ADD"
	if t.unpack != nil {
		info.AttemptUnpack = *t.unpack
	}
	t.addAction(t.source, src, info)
	return nil
}

// withParents copies with the directories above src, or those after "/./".
func withParents(src, os string) (root string, info llb.CopyInfo, err error) {
	root, pattern, ok := strings.Cut(src, "/./")
	if !ok {
		root, pattern = "/", src
	}
	if pattern, err = resolvePath("/", pattern, os, false); err != nil {
		return "", info, err
	}
	info.IncludePatterns = []string{strings.TrimPrefix(pattern, "/")}
	// Only of a path without wildcards it is known that it must exist.
	if !hasWildcard(root) && !hasWildcard(pattern) {
		required, err := resolvePath("/", path.Join(root, pattern), os, false)
		if err != nil {
			return "", info, err
		}
		info.RequiredPaths = []string{required}
	}
	return root, info, nil
}

func hasWildcard(p string) bool {
	for i := 0; i < len(p); i++ {
		switch p[i] {
		case '*', '?', '[':
			return true
		case '\\':
			i++
		}
	}
	return false
}

// addDocument copies an inline document.
func (t *transfer) addDocument(doc instructions.SourceContent) error {
	name, err := withoutDrive(doc.Path, t.stage.platform.OS, false)
	if err != nil {
		return err
	}
	t.addAction(t.inlineFile(name, 0o644, doc.Data), name, llb.CopyInfo{})
	return nil
}

// inlineFile is a file system with one file.
func (st *step) inlineFile(name string, perm os.FileMode, data string) llb.State {
	return llb.Scratch().File(llb.Mkfile(name, perm, []byte(data)),
		internalName("preparing inline document"),
		llb.Platform(*st.stage.platform))
}
