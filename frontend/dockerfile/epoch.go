package dockerfile

import (
	"archive/tar"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/kilnbuild/kiln/client/llb"
	"github.com/kilnbuild/kiln/frontend"
	"github.com/klauspost/compress/zstd"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/solver/pb"
)

// setEpoch finds out the time that everything is said to be made at. It is a
// number of seconds or names a source whose own time counts.
func (c *conversion) setEpoch(ctx context.Context) error {
	v, ok := c.buildArgs[epochArg]
	if !ok {
		v, _ = c.globals.Get(epochArg)
	}
	if v == "" {
		return nil
	}
	var err error
	if c.epoch, err = c.parseEpoch(ctx, v); err != nil {
		return err
	}
	// Stages that declare the argument see the time itself, or nothing.
	if _, ok := c.buildArgs[epochArg]; ok {
		delete(c.buildArgs, epochArg)
		if c.epoch != nil {
			c.buildArgs[epochArg] = strconv.FormatInt(c.epoch.Unix(), 10)
		}
	}
	if _, ok := c.globals.Get(epochArg); ok {
		c.globals = c.globals.Delete(epochArg)
		if c.epoch != nil {
			c.globals = c.globals.AddOrReplace(epochArg, strconv.FormatInt(c.epoch.Unix(), 10))
		}
	}
	return nil
}

func (c *conversion) parseEpoch(ctx context.Context, v string) (*time.Time, error) {
	if sec, err := strconv.ParseInt(v, 10, 64); err == nil {
		t := time.Unix(sec, 0).UTC()
		return &t, nil
	}
	if v == "context" {
		if c.context.source == nil {
			return nil, nil // a directory has no time of its own
		}
		t, err := c.sourceTime(ctx, *c.context.source, "[internal] resolve main build context metadata")
		if t != nil || err != nil || !c.context.archive {
			return t, err
		}
		return newestFile(ctx, c.context.download, httpContextFile)
	}
	nc, err := c.namedContext(v, nil, &pathSet{})
	if err != nil {
		return nil, fmt.Errorf("invalid %s: %s: %w", epochArg, v, err)
	}
	if nc != nil {
		st, _, err := nc.load(ctx)
		if err != nil {
			return nil, err
		}
		return c.sourceOrArchiveTime(ctx, st, "[internal] resolve SOURCE_DATE_EPOCH named context "+v)
	}
	for _, s := range c.parsed {
		if !strings.EqualFold(s.Name, v) {
			continue
		}
		st, err := c.epochStage(s)
		if err != nil {
			return nil, parser.WithLocation(err, s.Location)
		}
		return c.sourceOrArchiveTime(ctx, st, "[internal] resolve SOURCE_DATE_EPOCH source stage "+s.Name)
	}
	return nil, fmt.Errorf("invalid %s: %s", epochArg, v)
}

// sourceTime is the time that a source tells: when the commit was made or the
// download changed. It is nil if st is no source or tells none.
func (c *conversion) sourceTime(ctx context.Context, st llb.State, logName string) (*time.Time, error) {
	op := llb.SourceOp(st)
	if op == nil {
		return nil, nil
	}
	meta, err := c.metas.resolve(ctx, op, frontend.MetaOptions{LogName: logName, Objects: true})
	if err != nil {
		return nil, err
	}
	if meta.Git != nil && len(meta.Git.CommitObject) > 0 {
		return commitTime(meta.Git.CommitObject)
	}
	if strings.HasPrefix(op.Identifier, "git://") {
		return nil, fmt.Errorf("%s: the daemon doesn't tell the commit of %s", epochArg, op.Identifier)
	}
	if meta.HTTP == nil {
		return nil, nil
	}
	return meta.HTTP.LastModified, nil
}

// sourceOrArchiveTime falls back to the newest file of a downloaded archive.
func (c *conversion) sourceOrArchiveTime(ctx context.Context, st llb.State, logName string) (*time.Time, error) {
	t, err := c.sourceTime(ctx, st, logName)
	op := llb.SourceOp(st)
	if t != nil || err != nil || op == nil || !isRemote(op.Identifier) {
		return t, err
	}
	name := op.Attrs[pb.AttrHTTPFilename]
	if name == "" {
		return nil, nil
	}
	ref, _, err := c.solve(ctx, st)
	if err != nil {
		return nil, err
	}
	t, err = newestFile(ctx, ref, name)
	if errors.Is(err, errNotArchive) {
		return nil, nil
	}
	return t, err
}

// commitTime reads the committer's time from a raw commit object.
func commitTime(object []byte) (*time.Time, error) {
	for line := range strings.SplitSeq(string(object), "\n") {
		rest, ok := strings.CutPrefix(line, "committer ")
		if !ok {
			if line == "" {
				break // the message follows
			}
			continue
		}
		words := strings.Fields(rest)
		if len(words) < 2 {
			break
		}
		sec, err := strconv.ParseInt(words[len(words)-2], 10, 64)
		if err != nil {
			return nil, fmt.Errorf("%s: commit time: %w", epochArg, err)
		}
		t := time.Unix(sec, 0).UTC()
		return &t, nil
	}
	return nil, fmt.Errorf("%s: the commit has no committer", epochArg)
}

var errNotArchive = errors.New("not an archive")

// newestFile is the latest time of a regular file in an archive.
func newestFile(ctx context.Context, ref frontend.Ref, name string) (*time.Time, error) {
	dt, err := readFile(ctx, ref, name)
	if err != nil {
		return nil, err
	}
	r, err := decompress(dt)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", name, errNotArchive, err)
	}
	defer r.Close()
	var newest *time.Time
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		switch {
		case errors.Is(err, io.EOF):
			return newest, nil
		case err != nil:
			return nil, fmt.Errorf("%s: %w: %w", name, errNotArchive, err)
		}
		if t := h.ModTime.UTC(); h.FileInfo().Mode().IsRegular() && (newest == nil || t.After(*newest)) {
			newest = &t
		}
	}
}

func decompress(dt []byte) (io.ReadCloser, error) {
	r := bytes.NewReader(dt)
	switch {
	case bytes.HasPrefix(dt, []byte("\x1f\x8b\x08")):
		return gzip.NewReader(r)
	case bytes.HasPrefix(dt, []byte("BZh")):
		return io.NopCloser(bzip2.NewReader(r)), nil
	case bytes.HasPrefix(dt, []byte("\x28\xb5\x2f\xfd")):
		z, err := zstd.NewReader(r)
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	case bytes.HasPrefix(dt, []byte("\xfd7zXZ\x00")):
		return nil, errors.New("the time of xz archives can't be told")
	}
	return io.NopCloser(r), nil
}

// epochStage is the source that a stage made for nothing else adds.
func (c *conversion) epochStage(s instructions.Stage) (st llb.State, _ error) {
	env := c.globals.Delete(epochArg)
	base, err := expandWord(c.lex, s.BaseName, env)
	if err != nil {
		return st, fmt.Errorf("failed to process source stage base name %q: %w", s.BaseName, err)
	}
	if base.Result != scratchName {
		return st, errors.New("SOURCE_DATE_EPOCH stage must use FROM scratch")
	}
	found := false
	for _, cmd := range s.Commands {
		switch cmd := cmd.(type) {
		case *instructions.ArgCommand:
			if env, err = c.epochArgs(cmd, env); err != nil {
				return st, err
			}
		case *instructions.AddCommand:
			if found {
				return st, errors.New("SOURCE_DATE_EPOCH stage must contain exactly one remote ADD")
			}
			found = true
			if st, err = c.epochSource(cmd, env); err != nil {
				return st, err
			}
		default:
			return st, fmt.Errorf("SOURCE_DATE_EPOCH stage does not meet source-only requirements: unsupported %s instruction", cmd.Name())
		}
	}
	if !found {
		return st, errors.New("SOURCE_DATE_EPOCH stage must contain exactly one remote ADD")
	}
	return st, nil
}

func (c *conversion) epochArgs(cmd *instructions.ArgCommand, env llb.EnvList) (llb.EnvList, error) {
	for _, arg := range cmd.Args {
		if v, ok := c.buildArgs[arg.Key]; ok {
			env = env.AddOrReplace(arg.Key, v)
			continue
		}
		if arg.Value == nil {
			continue
		}
		word, err := expandWord(c.lex, *arg.Value, env)
		if err != nil {
			return env, err
		}
		env = env.AddOrReplace(arg.Key, word.Result)
	}
	return env, nil
}

func (c *conversion) epochSource(cmd *instructions.AddCommand, env llb.EnvList) (st llb.State, _ error) {
	if len(cmd.SourceContents) != 0 || len(cmd.SourcePaths) != 1 {
		return st, errors.New("SOURCE_DATE_EPOCH stage must contain exactly one remote ADD source")
	}
	word, err := expandWord(c.lex, cmd.SourcePaths[0], env)
	if err != nil {
		return st, err
	}
	src := word.Result
	if word, err = expandWord(c.lex, cmd.Checksum, env); err != nil {
		return st, err
	}
	checksum := word.Result
	repo, err := llb.ParseGitRepo(src)
	switch {
	case err == nil && !repo.LooksLocal:
		repo.Checksum = firstOf(checksum, repo.Checksum)
		if cmd.KeepGitDir != nil && *cmd.KeepGitDir {
			repo.KeepGitDir = cmd.KeepGitDir
		}
		return llb.Git(repo.Remote, "", gitOptions(repo, c.cfg.gitAdvice)...), nil
	case err != nil && !errors.Is(err, llb.ErrNotGit):
		return st, err
	case isRemote(src):
		dgst, err := parseChecksum(checksum)
		return llb.HTTP(src, llb.Filename(downloadName(src)), llb.Checksum(dgst)), err
	}
	return st, errors.New("SOURCE_DATE_EPOCH stage source must be a single HTTP(S) or Git ADD")
}
