package contenthash

import (
	"crypto/sha256"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/patternmatcher"
	"github.com/opencontainers/go-digest"
)

// selection finds what of a tree a wildcard or patterns select. It walks in
// order and looks at every file and directory header below the starting point:
//
//   - With a wildcard, a path counts from where it matches downwards, and the
//     patterns are applied to the rest; otherwise everything counts from the
//     given path downwards. The part of the path before the first wildcard is
//     resolved through links, but paths are matched and digested as asked for.
//   - The header of a directory that isn't itself selected is added when
//     something in it is. A directory given with a trailing slash counts
//     without its own header.
//   - A link is followed if the caller wants that and no directory header was
//     passed above it, that is, at the top level of the selection.
type selection struct {
	s       *scanner
	opts    *Options
	pattern string // the path asked for, as keyPath makes it
	asked   string // how the starting point was written...
	real    string // ...and where it is
	bare    bool   // the path ends in a slash
	depth   int    // nothing with more elements than this matches; 0 is no bound

	include, exclude *patternmatcher.PatternMatcher

	matched string // the path that the pattern matched last
	parents []*picked
	picked  []*picked
}

// picked is a file or a directory header.
type picked struct {
	node   *node
	at     string // where it is
	path   string // how it was asked for
	follow bool
	added  bool

	includeInfo, excludeInfo patternmatcher.MatchInfo
}

func (s *scanner) selectionDigest(p string, opts Options) (digest.Digest, error) {
	key := answerKey(p, &opts)
	if d, ok := s.tree.answers[key]; ok {
		return d, nil
	}
	sel, err := s.selection(p, opts)
	if err != nil {
		return "", err
	}
	d, err := sel.digest(path.Base(p))
	if err != nil {
		return "", err
	}
	if len(s.tree.answers) >= maxAnswers {
		s.tree.answers = nil
	}
	if s.tree.answers == nil {
		s.tree.answers = map[string]digest.Digest{}
	}
	s.tree.answers[key] = d
	return d, nil
}

// selection picks what p and opts select, and makes the digest of each known.
func (s *scanner) selection(p string, opts Options) (*selection, error) {
	sel := &selection{s: s, opts: &opts, pattern: keyPath(p), bare: strings.HasSuffix(p, "/")}
	if err := sel.run(); err != nil {
		return nil, err
	}
	return sel, sel.hash()
}

// maxAnswers bounds the answers kept for one tree; beyond it they start anew.
const maxAnswers = 256

func answerKey(p string, o *Options) string {
	return fmt.Sprintf("%q %s %s %q %q %q", p, strconv.FormatBool(o.FollowLinks), strconv.FormatBool(o.Wildcard),
		o.IncludePatterns, o.ExcludePatterns, o.RequiredPaths)
}

func (sel *selection) run() error {
	var err error
	if sel.include, err = matcher("include", sel.opts.IncludePatterns); err != nil {
		return err
	}
	if sel.exclude, err = matcher("exclude", sel.opts.ExcludePatterns); err != nil {
		return err
	}
	start, err := sel.start()
	if err != nil {
		return err
	}
	if start != nil {
		if err := sel.visit(start, sel.real); err != nil {
			return err
		}
	}
	for _, required := range sel.opts.RequiredPaths {
		if !sel.has(required) {
			return &notFoundError{required}
		}
	}
	return nil
}

func matcher(what string, patterns []string) (*patternmatcher.PatternMatcher, error) {
	if len(patterns) == 0 {
		return nil, nil
	}
	m, err := patternmatcher.New(patterns)
	if err != nil {
		return nil, fmt.Errorf("%s patterns %q: %w", what, patterns, err)
	}
	return m, nil
}

// start finds the node to walk from, nil if there is none.
func (sel *selection) start() (*node, error) {
	follow := false
	sel.asked = sel.pattern
	if sel.opts.Wildcard {
		literal, rest := SplitWildcards(sel.pattern)
		if !strings.ContainsAny(rest, `[\`) { // a class may match a slash
			sel.depth = strings.Count(sel.pattern, "/")
		}
		sel.asked, follow = keyPath(literal), rest != ""
	}
	n, at, err := sel.s.resolve(sel.asked, follow)
	sel.real = at
	return n, err
}

func (sel *selection) has(prefix string) bool {
	for _, p := range sel.picked {
		if strings.HasPrefix(p.path, prefix) {
			return true
		}
	}
	return false
}

func (sel *selection) visit(n *node, at string) error {
	asked := sel.asked + strings.TrimPrefix(at, sel.real)
	base := sel.pattern
	if sel.opts.Wildcard {
		if sel.pattern != "" && (sel.matched == "" || !strings.HasPrefix(asked, sel.matched+"/")) {
			ok, err := path.Match(sel.pattern, asked)
			if err != nil {
				return fmt.Errorf("wildcard %q: %w", sel.pattern, err)
			}
			if !ok {
				if sel.depth > 0 && strings.Count(asked, "/") >= sel.depth {
					return nil
				}
				return sel.visitChildren(n, at)
			}
			sel.matched = asked
		}
		base = sel.matched
	}
	if n.kind == dir && sel.bare && asked == sel.pattern {
		return sel.visitChildren(n, at)
	}

	p := &picked{node: n, at: at, path: asked}
	var parent picked
	if len(sel.parents) > 0 {
		parent = *sel.parents[len(sel.parents)-1]
	} else {
		p.follow = sel.opts.FollowLinks
	}
	included, excluded, err := sel.matches(relative(asked, base), p, &parent)
	if err != nil {
		return err
	}
	if included && !excluded {
		sel.add(p)
	}
	if n.kind != dir || excluded && !sel.exclude.Exclusions() {
		return nil // all below an excluded directory is, if nothing takes that back
	}
	sel.parents = append(sel.parents, p)
	err = sel.visitChildren(n, at)
	sel.parents = sel.parents[:len(sel.parents)-1]
	return err
}

func (sel *selection) visitChildren(n *node, at string) error {
	if n.kind != dir {
		return nil
	}
	if err := sel.s.list(n, at); err != nil {
		return err
	}
	for _, c := range n.children {
		if err := sel.visit(c, at+"/"+c.name); err != nil {
			return err
		}
	}
	return nil
}

func relative(p, base string) string {
	return strings.TrimSuffix(strings.TrimPrefix(p+"/", base+"/"), "/")
}

// matches applies the patterns. Exclude patterns are looked at only for what is
// included: it shows in the results below a directory.
func (sel *selection) matches(rel string, p, parent *picked) (included, excluded bool, err error) {
	if sel.include != nil {
		included, p.includeInfo, err = sel.include.MatchesUsingParentResults(rel, parent.includeInfo)
		if err != nil {
			return false, false, fmt.Errorf("match %q against include patterns: %w", rel, err)
		}
		if !included {
			return false, false, nil
		}
	}
	if sel.exclude != nil {
		excluded, p.excludeInfo, err = sel.exclude.MatchesUsingParentResults(rel, parent.excludeInfo)
		if err != nil {
			return false, false, fmt.Errorf("match %q against exclude patterns: %w", rel, err)
		}
	}
	return true, excluded, nil
}

func (sel *selection) add(p *picked) {
	for _, q := range append(sel.parents, p) {
		if !q.added {
			q.added = true
			sel.picked = append(sel.picked, q)
		}
	}
}

// hash makes known what stands for each that was picked.
func (sel *selection) hash() error {
	var todo work
	for _, p := range sel.picked {
		switch {
		case p.node.kind == dir:
			todo.addDir(p.at, p.node)
		case !p.followed():
			todo.add(path.Dir(p.at), p.node)
		}
	}
	return sel.s.hash(todo)
}

// head is the digest that stands for p.
func (sel *selection) head(p *picked) (sum, error) {
	if !p.followed() {
		return p.node.head, nil
	}
	n, err := sel.s.filled(p.path, true)
	if err != nil {
		return sum{}, err
	}
	return *n.sum(), nil
}

// digest is that of all that was picked. base is the last element of the path
// asked for.
func (sel *selection) digest(base string) (digest.Digest, error) {
	var list []byte
	for _, p := range sel.picked {
		head, err := sel.head(p)
		if err != nil {
			return "", err
		}
		d := head.digest()
		if len(sel.picked) == 1 && base == path.Base(p.path) {
			return d, nil
		}
		name := strings.TrimPrefix(p.path, sel.asked)
		if name == "" {
			name = "/"
		}
		list = append(append(list, strings.ReplaceAll(name, "/", "\x00")...), d...)
	}
	d := sum(sha256.Sum256(list))
	return d.digest(), nil
}

func (p *picked) followed() bool { return p.follow && p.node.kind == symlink }

// SplitWildcards splits p before the first element that holds a wildcard: literal
// is absolute and clean, and all of p if nothing is left.
func SplitWildcards(p string) (literal, rest string) {
	elems := strings.Split(p, "/")
	if i := slices.IndexFunc(elems, hasWildcards); i >= 0 {
		return path.Join("/", path.Join(elems[:i]...)), path.Join(elems[i:]...)
	}
	return path.Join("/", p), ""
}

func hasWildcards(s string) bool {
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '*', '?', '[':
			return true
		case '\\':
			i++
		}
	}
	return false
}
