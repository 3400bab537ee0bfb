package dockerfile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"sync"

	"github.com/kilnbuild/kiln/client/llb"
	"github.com/kilnbuild/kiln/frontend"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/patternmatcher/ignorefile"
)

// maxFileSize bounds what is read into memory: what one gRPC message holds.
const maxFileSize = 16 << 20

// readFile reads a small file.
func readFile(ctx context.Context, ref frontend.Ref, name string) ([]byte, error) {
	if ref == nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	st, err := ref.StatFile(ctx, name)
	if err == nil && st.Size > maxFileSize {
		return nil, fmt.Errorf("%s has %d bytes, more than the %d allowed", name, st.Size, int64(maxFileSize))
	}
	// A failing stat is left to the read: the file may be a symlink.
	dt, err := ref.ReadFile(ctx, name, &gwpb.FileRange{Length: maxFileSize + 1})
	if err != nil {
		return nil, err
	}
	if len(dt) > maxFileSize {
		return nil, fmt.Errorf("%s has more than the %d bytes allowed", name, int64(maxFileSize))
	}
	return dt, nil
}

// readOptional reads a file that may be missing.
func readOptional(ctx context.Context, ref frontend.Ref, name string) (dt []byte, found bool, _ error) {
	dt, err := readFile(ctx, ref, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	return dt, err == nil, err
}

// readDockerfile reads the Dockerfile and, beside it, its own ignore file.
func (b *build) readDockerfile(ctx context.Context) error {
	name, ignoreName := b.context.filename, b.context.filename+dockerignoreName
	names := []string{name, ignoreName}
	lower := b.cfg.lowerName()
	if lower != "" && name == b.cfg.filename {
		names = append(names, lower)
	}

	var src llb.State
	if f := b.context.dockerfile; f != nil {
		src = *f
	} else {
		local := b.context.dockerfileLocal
		src = llb.Local(local,
			llb.FollowPaths(names),
			llb.SessionID(b.session(local)),
			llb.SharedKeyHint(local),
			internalName("load build definition from "+name),
			llb.Differ(llb.DiffNone, false),
		)
	}
	ref, def, err := b.solve(ctx, src)
	if err != nil {
		return fmt.Errorf("failed to resolve dockerfile: %w", err)
	}
	if b.fileVertex, err = llb.Head(def); err != nil {
		return err
	}

	dt, err := readFile(ctx, ref, name)
	if errors.Is(err, fs.ErrNotExist) && len(names) > 2 {
		if dt2, found, err2 := readOptional(ctx, ref, lower); err2 != nil {
			err = err2
		} else if found {
			dt, err = dt2, nil
		}
	}
	if err != nil {
		return fmt.Errorf("failed to read dockerfile: %w", err)
	}
	b.file = &llb.SourceMap{Filename: name, Language: "Dockerfile", Data: dt, Definition: def}

	dt, found, err := readOptional(ctx, ref, ignoreName)
	if err != nil {
		return fmt.Errorf("read %s: %w", ignoreName, err)
	}
	if found {
		b.ignore.patterns, err = parseIgnore(ignoreName, dt)
		b.ignore.read = err == nil
	}
	return err
}

// ignoreFile holds the patterns of the main context's ignore file.
type ignoreFile struct {
	mu       sync.Mutex // guards the fields below; held while the file is read, once per build
	read     bool
	patterns []string
}

// ignorePatterns returns what a local main context leaves out: as the
// Dockerfile's own ignore file says or else the one at the context's root.
func (b *build) ignorePatterns(ctx context.Context) ([]string, error) {
	if b.context.state != nil {
		return nil, nil
	}
	b.ignore.mu.Lock()
	defer b.ignore.mu.Unlock()
	if b.ignore.read {
		return b.ignore.patterns, nil
	}
	local := b.context.local
	patterns, err := b.readIgnore(ctx, llb.Local(local,
		llb.SessionID(b.session(local)),
		llb.FollowPaths([]string{dockerignoreName}),
		llb.SharedKeyHint(local+"-"+dockerignoreName),
		internalName("load "+dockerignoreName),
		llb.Differ(llb.DiffNone, false),
	))
	if err != nil {
		return nil, err
	}
	b.ignore.patterns, b.ignore.read = patterns, true
	return patterns, nil
}

// readIgnore reads the ignore file at the root of src; there may be none.
func (b *build) readIgnore(ctx context.Context, src llb.State) ([]string, error) {
	ref, _, err := b.solve(ctx, src)
	if err != nil {
		return nil, err
	}
	dt, _, err := readOptional(ctx, ref, dockerignoreName)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", dockerignoreName, err)
	}
	return parseIgnore(dockerignoreName, dt)
}

func parseIgnore(name string, dt []byte) ([]string, error) {
	patterns, err := ignorefile.ReadAll(bytes.NewReader(dt))
	if err != nil {
		return nil, fmt.Errorf("parse %s: %w", name, err)
	}
	return patterns, nil
}

// internalName names a step that no instruction asks for.
func internalName(name string) llb.ConstraintsOpt {
	return llb.WithCustomName("[internal] " + name)
}

// cleanRel is a path as sources are told of it: relative to their root.
func cleanRel(p string) string { return path.Join(".", p) }
