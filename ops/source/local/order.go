package local

import (
	"fmt"
	"strings"

	"io/fs"

	"github.com/tonistiigi/fsutil/types"
)

// walk checks that paths come as a walk of a tree brings them: clean,
// relative, each directory before what is in it, names in order, nothing twice
// (SES-045).
type walk struct {
	dirs []dir // from the root to where the walk is
}

// dir is a directory that the walk is in.
type dir struct {
	path string // "" is the root
	last string // the last name in it
	mode fs.FileMode
}

func newWalk() walk { return walk{dirs: []dir{{}}} }

// enter checks that path may come next and returns the directory it is in.
func (w *walk) enter(path string) (*dir, error) {
	if err := checkPath(path); err != nil {
		return nil, err
	}
	parent, name := split(path)
	for len(w.dirs) > 0 && w.dirs[len(w.dirs)-1].path != parent {
		w.dirs = w.dirs[:len(w.dirs)-1]
	}
	if len(w.dirs) == 0 {
		return nil, fmt.Errorf("client sent %q out of order: its directory wasn't sent before it", path)
	}
	d := &w.dirs[len(w.dirs)-1]
	if d.last >= name {
		return nil, fmt.Errorf("client sent %q out of order, after %q", path, d.last)
	}
	d.last = name
	return d, nil
}

// push makes the directory that was entered last the one the walk is in.
func (w *walk) push(path string, mode fs.FileMode) {
	w.dirs = append(w.dirs, dir{path: path, mode: mode})
}

// checkPath accepts clean relative paths that lead to something.
func checkPath(path string) error {
	if path == "" || strings.IndexByte(path, 0) >= 0 {
		return fmt.Errorf("client sent the path %q, which is invalid", path)
	}
	for rest := path; ; {
		name, more, ok := strings.Cut(rest, "/")
		if name == "" || name == "." || name == ".." {
			return fmt.Errorf("client sent the path %q, which is not a clean relative path", path)
		}
		if !ok {
			return nil
		}
		rest = more
	}
}

func split(path string) (parent, name string) {
	i := strings.LastIndexByte(path, '/')
	if i < 0 {
		return "", path
	}
	return path[:i], path[i+1:]
}

// comparePaths orders paths as a walk does: as strings, with the separator
// before every other byte.
func comparePaths(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		switch {
		case a[i] == b[i]:
		case a[i] == '/':
			return -1
		case b[i] == '/':
			return 1
		case a[i] < b[i]:
			return -1
		default:
			return 1
		}
	}
	return len(a) - len(b)
}

// below tells whether path is in the tree under dir.
func below(path, dir string) bool {
	return len(path) > len(dir) && path[len(dir)] == '/' && path[:len(dir)] == dir
}

// kind is what an entry is.
type kind uint8

const (
	kindFile kind = iota
	kindDir
	kindSymlink
	kindHardlink
	kindNode // device or fifo
)

// kindOf says what st is; what can't be in a tree is an error.
func kindOf(st *types.Stat) (kind, error) {
	mode := fs.FileMode(st.Mode)
	switch {
	case mode.IsDir():
		return kindDir, nil
	case mode&(fs.ModeDevice|fs.ModeNamedPipe) != 0:
		return kindNode, nil
	case mode&fs.ModeSymlink != 0:
		return kindSymlink, nil
	case mode&fs.ModeType != 0:
		return 0, fmt.Errorf("client sent %q, which has the unsupported type %s", st.Path, mode.Type())
	case st.Linkname != "":
		return kindHardlink, nil
	}
	return kindFile, nil
}
