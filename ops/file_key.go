package ops

import (
	"context"
	"encoding/json"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/kilnbuild/kiln/cache/contenthash"
	"github.com/kilnbuild/kiln/ops/filetree"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// fileCacheMap makes the op's key (LLB-152): the digest of a JSON list of the
// actions' own JSON. What is copied from an input counts by its base name
// there, because its content, with the names below it, is part of the key of
// that input (LLB-153). An input that is also changed counts as a whole.
func fileCacheMap(op *pb.FileOp, inputs int) (*solver.CacheMap, error) {
	key := struct {
		Type    string
		Actions [][]byte
		Indexes [][]int `json:"indexes,omitempty"`
	}{Type: "buildkit.file.v0"}
	for i, a := range op.Actions {
		dt, err := json.Marshal(fileKeyBody(a, inputs))
		if err != nil {
			return nil, fmt.Errorf("encode action %d for the cache key: %w", i, err)
		}
		key.Actions = append(key.Actions, dt)
		key.Indexes = append(key.Indexes, []int{int(a.Input), int(a.SecondaryInput), int(a.Output)})
	}
	if fileDefaultIndexes(key.Indexes) {
		key.Indexes = nil
	}
	m, _, err := definitionKey(key, inputs)
	if err != nil {
		return nil, err
	}
	reads := fileReads(op, inputs)
	for i := range m.Deps {
		m.Deps[i].Prepare = extract
		if sels := reads[i]; len(sels) > 0 {
			m.Deps[i].Selector = fileSelectorDigest(sels)
			m.Deps[i].Content = fileContent(fileDedupe(sels))
		}
	}
	return m, nil
}

// fileKeyBody is what of an action enters the key as JSON.
func fileKeyBody(a *pb.FileAction, inputs int) any {
	switch x := a.Action.(type) {
	case *pb.FileAction_Mkdir:
		return x.Mkdir
	case *pb.FileAction_Mkfile:
		return x.Mkfile
	case *pb.FileAction_Symlink:
		return x.Symlink
	case *pb.FileAction_Rm:
		return x.Rm
	case *pb.FileAction_Copy:
		if fileIsInput(a.SecondaryInput, inputs) {
			c := x.Copy.CloneVT()
			c.Src = path.Base(c.Src)
			return c
		}
		return x.Copy
	}
	return nil
}

func fileIsInput(state int64, inputs int) bool { return state >= 0 && state < int64(inputs) }

// fileReads are the parts of each input that count by their content: what is
// read of those that aren't also changed.
func fileReads(op *pb.FileOp, inputs int) map[int][]fileSelector {
	reads := make(map[int][]fileSelector)
	for _, a := range op.Actions {
		fileActionReads(a, inputs, reads)
	}
	for _, a := range op.Actions {
		delete(reads, int(a.Input))
	}
	return reads
}

// fileActionReads adds what the action reads of the op's inputs to reads. What
// it reads of other actions follows from their keys.
func fileActionReads(a *pb.FileAction, inputs int, reads map[int][]fileSelector) {
	add := func(state int64, s fileSelector) {
		if fileIsInput(state, inputs) {
			reads[int(state)] = append(reads[int(state)], s)
		}
	}
	owner := fileActionOwner(a)
	if by := owner.GetUser().GetByName(); by != nil {
		add(by.Input, fileSelector{path: filetree.PasswdFile, opts: contenthash.Options{FollowLinks: true}})
	}
	if by := owner.GetGroup().GetByName(); by != nil {
		add(by.Input, fileSelector{path: filetree.GroupFile, opts: contenthash.Options{FollowLinks: true}})
	}
	if c := a.GetCopy(); c != nil {
		_, pattern := contenthash.SplitWildcards(c.Src)
		add(a.SecondaryInput, fileSelector{path: c.Src, opts: contenthash.Options{
			FollowLinks:     c.FollowSymlink,
			Wildcard:        c.AllowWildcard && pattern != "",
			IncludePatterns: c.IncludePatterns,
			ExcludePatterns: c.ExcludePatterns,
			RequiredPaths:   c.RequiredPaths,
		}})
	}
}

// fileDefaultIndexes reports whether the actions form the usual chain, each
// going on from the one before, which older keys left out.
func fileDefaultIndexes(indexes [][]int) bool {
	last := len(indexes) - 1
	for i, idx := range indexes {
		input, output := 0, int(pb.SkipOutput)
		if i > 0 {
			// Not the number of the state before this one, unless there are as
			// many inputs as actions: this is how it is compared everywhere.
			input = len(indexes) + i - 1
		}
		if i == last {
			output = 0
		}
		if idx[0] != input || idx[1] != -1 && idx[1] != 1 || idx[2] != output {
			return false
		}
	}
	return true
}

// fileSelector names a part of an input.
type fileSelector struct {
	path string
	opts contenthash.Options
}

func (s fileSelector) filters() bool {
	return s.opts.Wildcard || len(s.opts.IncludePatterns) > 0 || len(s.opts.ExcludePatterns) > 0
}

// fileSelectorDigest is over the paths, as often as they are named, from last
// to first.
func fileSelectorDigest(sels []fileSelector) digest.Digest {
	paths := make([]string, len(sels))
	for i, s := range sels {
		paths[i] = s.path
	}
	slices.Sort(paths)
	slices.Reverse(paths)
	return digest.FromString(strings.Join(paths, "\x00"))
}

// fileDedupe brings the selectors into the order of the content key: by path,
// a plain one before one that follows links before those with wildcards or
// patterns. Plain ones below another of the same kind are left out.
func fileDedupe(sels []fileSelector) []fileSelector {
	var out []fileSelector
	for _, follow := range []bool{false, true} {
		var paths []string
		for _, s := range sels {
			if !s.filters() && s.opts.FollowLinks == follow {
				paths = append(paths, s.path)
			}
		}
		for _, p := range outermost(paths) {
			out = append(out, fileSelector{path: p, opts: contenthash.Options{FollowLinks: follow}})
		}
	}
	for _, s := range sels {
		if s.filters() {
			out = append(out, s)
		}
	}
	slices.SortFunc(out, func(a, b fileSelector) int { return strings.Compare(a.path, b.path) })
	return out
}

// fileContent digests the parts of the input that sels name.
func fileContent(sels []fileSelector) func(context.Context, solver.Asker, solver.Result) (digest.Digest, error) {
	return func(ctx context.Context, _ solver.Asker, input solver.Result) (digest.Digest, error) {
		ref, err := refOf(input)
		if err != nil {
			return "", err
		}
		digests := make([]string, len(sels))
		eg, ctx := errgroup.WithContext(ctx)
		for i, s := range sels {
			eg.Go(func() error {
				d, err := contenthash.Checksum(ctx, ref, path.Join("/", s.path), s.opts)
				if err != nil {
					return fmt.Errorf("failed to calculate checksum of ref %s: %w", Result{ref}.ID(), err)
				}
				digests[i] = string(d)
				return nil
			})
		}
		if err := eg.Wait(); err != nil {
			return "", lostInput(0, err)
		}
		return digest.FromString(strings.Join(digests, "\x00")), nil
	}
}
