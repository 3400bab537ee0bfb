package filetree

import (
	"cmp"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/kilnbuild/kiln/cache/contenthash"
	"github.com/kilnbuild/kiln/internal/files"
)

// wildcards returns the paths that src matches, in order, or src itself,
// cleaned, if it has no wildcards (LLB-073). The part before the first wildcard
// is resolved through links, but one at its end only if follow is set; below
// it, links aren't followed. Nothing below a match is matched again.
func (r Root) wildcards(src string, follow bool) ([]string, error) {
	base, pattern := contenthash.SplitWildcards(path.Join("/", src))
	if pattern == "" {
		return []string{base}, nil
	}
	at, err := r.resolve(base, follow)
	if err != nil {
		return nil, err
	}
	st, err := r.lstat(at)
	if err != nil {
		return nil, err
	}
	if !files.IsDir(&st) {
		return nil, nil
	}
	m := matcher{pattern: pattern, base: at}
	if !strings.ContainsAny(pattern, `[\`) { // a class may match a slash
		m.depth = 1 + strings.Count(pattern, "/")
	}
	fd, err := r.openDir(at)
	if err != nil {
		return nil, err
	}
	if err := m.walk(fd, "", 1); err != nil {
		return nil, err
	}
	return m.matches, nil
}

// matcher collects what below base matches pattern.
type matcher struct {
	pattern string
	base    string
	depth   int // matches have this many elements; 0 is any number
	matches []string
}

// walk goes through the open directory dir, which it closes.
func (m *matcher) walk(dir int, rel string, depth int) error {
	f := os.NewFile(uintptr(dir), files.Path(dir))
	defer f.Close()
	entries, err := f.ReadDir(-1)
	if err != nil {
		return pathErr("read", path.Join(m.base, rel), cause(err))
	}
	slices.SortFunc(entries, func(a, b os.DirEntry) int { return cmp.Compare(a.Name(), b.Name()) })
	for _, e := range entries {
		name := path.Join(rel, e.Name())
		if ok, err := path.Match(m.pattern, name); ok && err == nil {
			m.matches = append(m.matches, path.Join(m.base, name))
			continue
		}
		if !e.IsDir() || m.depth > 0 && depth >= m.depth {
			continue
		}
		sub, err := files.OpenDir(dir, e.Name())
		if err != nil {
			return pathErr("open", path.Join(m.base, name), err)
		}
		if err := m.walk(sub, name, depth+1); err != nil {
			return err
		}
	}
	return nil
}
