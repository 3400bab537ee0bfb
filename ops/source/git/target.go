package git

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/moby/buildkit/session"
)

// target is what a ref was found to stand for.
type target struct {
	ref    string // in full, such as refs/heads/main, or the commit that was asked for
	object string // a commit, or an annotated tag
	commit string // what object, a tag, was said to be of; "" otherwise, or if it isn't known
}

// identity is the object that names the checkout: the commit rather than a tag
// of it, unless the tag is part of the result.
func (t *target) identity(sp *spec) string {
	if t.commit != "" && !sp.keepDir {
		return t.commit
	}
	return t.object
}

// pinned is the target if the op says it all and nobody has to be asked.
func (sp *spec) pinned() (*target, bool) {
	switch {
	case isCommit(sp.ref):
		return &target{ref: sp.ref, object: sp.ref}, true
	case !sp.byCommit:
		return nil, false
	case sp.ref == "":
		return &target{ref: sp.checksum, object: sp.checksum}, true
	case strings.HasPrefix(sp.ref, "refs/"):
		return &target{ref: sp.ref, object: sp.checksum}, true
	}
	return &target{ref: "refs/heads/" + sp.ref, object: sp.checksum}, true
}

// lookUp asks the remote.
func (s *Source) lookUp(ctx context.Context, sp *spec, g session.Group) (_ *target, err error) {
	a, err := s.openAccess(ctx, sp, g)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, a.close()) }()
	args := []string{"ls-remote", "--symref", "--", sp.url, "HEAD"}
	if sp.ref != "" {
		args = []string{"ls-remote", "--", sp.url, sp.ref, sp.ref + "^{}"}
	}
	out, err := s.remote(ctx, sp, a, command{args: args})
	if err != nil {
		return nil, sp.unreachable(ctx, err)
	}
	return sp.choose(parseAdvertised(string(out)))
}

// expects fails if t isn't what the op says that the ref stands for.
func (sp *spec) expects(t *target) error {
	if strings.HasPrefix(t.object, sp.checksum) || strings.HasPrefix(t.commit, sp.checksum) {
		return nil
	}
	is := t.object
	if t.commit != "" {
		is += " or " + t.commit
	}
	return fmt.Errorf("expected checksum to match %s, got %s for %s of %s", sp.checksum, is, t.ref, sp.url)
}

// unreachable says of whom err is, unless the asker has left.
func (sp *spec) unreachable(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return fmt.Errorf("failed to fetch remote %s: %w", sp.url, err)
}

// advertised are a remote's refs.
type advertised struct {
	head    string // the ref that HEAD is
	objects map[string]string
}

func parseAdvertised(out string) advertised {
	a := advertised{objects: map[string]string{}}
	for line := range strings.Lines(out) {
		left, name, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
		if !ok {
			continue
		}
		if ref, ok := strings.CutPrefix(left, "ref: "); ok {
			if name == "HEAD" {
				a.head = ref
			}
			continue
		}
		a.objects[name] = left
	}
	return a
}

// choose takes the ref that is meant: one with the name in full, a branch, or a
// tag, in this order.
func (sp *spec) choose(a advertised) (*target, error) {
	ref := sp.ref
	if ref == "" {
		if !strings.HasPrefix(a.head, "refs/heads/") || !validRef(a.head) {
			return nil, fmt.Errorf("could not find default branch for repository: %s; name a branch, tag or commit", sp.url)
		}
		return newTarget(a.head, a.objects["HEAD"], "")
	}
	full := "refs/" + strings.TrimPrefix(ref, "refs/")
	tag := "refs/tags/" + strings.TrimPrefix(ref, "refs/tags/")
	for _, name := range []string{full, "refs/heads/" + strings.TrimPrefix(ref, "refs/heads/"), tag} {
		object, ok := a.objects[name]
		if !ok {
			continue
		}
		commit := ""
		if name == tag {
			commit = a.objects[name+"^{}"]
		}
		return newTarget(name, object, commit)
	}
	return nil, fmt.Errorf("repository does not contain ref %s: %s", ref, sp.url)
}

func newTarget(ref, object, commit string) (*target, error) {
	for _, id := range []string{object, commit} {
		if !isCommit(id) && (id != "" || id == object) {
			return nil, fmt.Errorf("the remote says that %s is the invalid object %q", ref, id)
		}
	}
	return &target{ref: ref, object: object, commit: commit}, nil
}
