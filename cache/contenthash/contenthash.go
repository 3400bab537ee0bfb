// Package contenthash computes content digests of parts of a filesystem state,
// byte for byte as the protocol defines them (LLB-177), and keeps them beside
// the record so that the same tree is never read twice.
//
// A record's digests form a tree (node), one node per path. It starts out
// knowing nothing and is filled only where somebody asks: directories are
// listed while a path is resolved or a selection walked, files are read when
// their digest is needed. The local source fills it whole, through a Recorder,
// from what it receives. What is known is stored beside the record and shared
// by all callers in memory.
//
// What the digests are:
//
//   - A file, link, device or directory header is sha256 over the fields of
//     Header, followed by the bytes of a regular file. Name and mtime are no
//     part of it.
//   - A directory is sha256 over "\x00" and the digest of its own header,
//     then, for every child in byte order, "\x00", its name and its digest; that
//     of a child directory is its recursive one. Digests are written as text.
//   - A selection by wildcard or patterns is sha256 over the path (with "\x00"
//     for "/") and digest of every selected file and directory header, in
//     order; see selection for what is selected.
//
// Lock order: forest.mu is never held while a tree is held or anything is read.
// A tree is held by one caller at a time, also across I/O: whoever else wants
// the same tree wants the same answers.
package contenthash

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"

	"github.com/kilnbuild/kiln/cache"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Options select what of a tree is digested.
type Options struct {
	// FollowLinks resolves a symlink as last element of the path, or, in a
	// selection, one that isn't below a selected directory.
	FollowLinks bool
	// Wildcard gives the path the meaning of a path.Match pattern.
	Wildcard bool
	// IncludePatterns and ExcludePatterns filter what is below the path, in
	// the syntax of .dockerignore.
	IncludePatterns []string
	ExcludePatterns []string
	// RequiredPaths are path prefixes; a selection that holds nothing under
	// one of them is an error. Only selections (a wildcard or patterns) look.
	RequiredPaths []string
}

func (o *Options) selects() bool {
	return o.Wildcard || len(o.IncludePatterns) > 0 || len(o.ExcludePatterns) > 0
}

// Checksum returns the content digest of p in ref (nil is empty), as
// upstream computes it. A path that isn't there is an error that wraps
// fs.ErrNotExist.
func Checksum(ctx context.Context, ref *cache.Ref, p string, opts Options) (digest.Digest, error) {
	if ref == nil {
		if p == "/" {
			return digest.FromBytes(nil), nil
		}
		return "", &scratchError{p}
	}
	return checksum(ctx, refRecord{ref}, p, opts)
}

// record is what Checksum needs of a *cache.Ref.
type record interface {
	ID() string
	Metadata(key string) ([]byte, bool)
	SetMetadata(key string, value []byte)
	// openRoot opens the record's root directory.
	openRoot(ctx context.Context) (rootDir, error)
}

// rootDir is an open root directory; fd is good until close.
type rootDir struct {
	fd      int
	witness witness // nil if nobody knows what the files were like
	close   func() error
}

// witness says whether a directory or file, by its path relative to the root,
// is what was committed: a digest of anything else would be a lie.
type witness interface {
	Dir(ctx context.Context, path string) error
	File(ctx context.Context, path string, st *unix.Stat_t) error
}

type refRecord struct{ *cache.Ref }

func (r refRecord) openRoot(ctx context.Context) (rootDir, error) {
	v, err := r.Ref.Open(ctx)
	if err != nil {
		return rootDir{}, err
	}
	w, err := r.Witness(ctx)
	if err != nil {
		return rootDir{}, errors.Join(err, v.Close())
	}
	return rootDir{v.FD(), w, func() error { return errors.Join(v.Close(), w.Close()) }}, nil
}

func checksum(ctx context.Context, rec record, p string, opts Options) (d digest.Digest, err error) {
	err = scan(ctx, rec, func(s *scanner) (err error) {
		if opts.selects() {
			d, err = s.selectionDigest(p, opts)
			return err
		}
		n, err := s.filled(keyPath(p), opts.FollowLinks)
		if err != nil {
			return err
		}
		d = n.sum().digest()
		return nil
	})
	return d, err
}

// scan calls fn with what is known of rec's tree, and stores what it adds.
func scan(ctx context.Context, rec record, fn func(*scanner) error) (err error) {
	t := shared.tree(rec.ID())
	if err := t.acquire(ctx); err != nil {
		return err
	}
	defer t.release()
	t.load(rec)

	s := &scanner{ctx: ctx, rec: rec, tree: t}
	defer func() { err = errors.Join(err, s.close()) }()
	defer func() {
		// What was found holds even if the call failed later on.
		if s.changed {
			t.store(rec)
		}
	}()
	return fn(s)
}

// filled is the node at p, whose digest is known.
func (s *scanner) filled(p string, follow bool) (*node, error) {
	n, at, err := s.resolve(p, follow)
	if err != nil {
		return nil, err
	}
	if n == nil {
		return nil, &notFoundError{p}
	}
	return n, s.fill(n, at)
}

// notFoundError reads as clients expect it: `"/foo": not found`.
type notFoundError struct{ path string }

func (e *notFoundError) Error() string        { return fmt.Sprintf("%q: not found", e.path) }
func (e *notFoundError) Is(target error) bool { return target == fs.ErrNotExist }

// scratchError is the notFoundError of the empty filesystem.
type scratchError struct{ path string }

func (e *scratchError) Error() string        { return e.path + ": no such file or directory" }
func (e *scratchError) Is(target error) bool { return target == fs.ErrNotExist }

// keyPath brings a path into the form used throughout: "" is the root, anything
// else starts with a slash, ends in none and is clean.
func keyPath(p string) string {
	p = path.Join("/", p)
	if p == "/" {
		return ""
	}
	return p
}
