package snapshot

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/kilnbuild/kiln/internal/files"
	"golang.org/x/sys/unix"
)

// walker finds and makes directories in a layer directory, seeing the parent
// below it as overlay does.
type walker struct {
	root      *layerDir
	hasParent bool
	xattr     string
	dirs      map[string]*layerDir // open ones, by path
	stale     bool                 // dirs must be forgotten before the next entry
	// stamp are the times of a directory that the tar needs but doesn't have.
	stamp dirTimes
	// onMkdir is told of new directories and the times they should end with.
	onMkdir func(*layerDir, dirTimes)
}

// layerDir is an open directory of the layer.
type layerDir struct {
	path   string // from the root, with slashes at both ends
	fd     int    // in the layer
	lower  int    // the same directory in the parent; -1 if that has none, or it is hidden
	parent *layerDir
	// inherited are the xattrs that were copied from the parent's.
	inherited []string
	// listed: the directory is marked for overlay as one that may hold
	// whiteouts.
	listed bool
}

// entry names a file in the directory for calls on xattrs.
func (d *layerDir) entry(name string) files.Xattrs {
	return files.XattrsAt(d.fd, name)
}

const (
	maxOpenDirs = 128
	maxSymlinks = 255
)

func (w *walker) open(layer layerInfo, parent *View) error {
	fd, err := files.OpenDir(unix.AT_FDCWD, layer.dir)
	if err != nil {
		return fmt.Errorf("open %s: %w", layer.dir, gone(err))
	}
	w.root = &layerDir{path: "/", fd: fd, lower: -1}
	w.xattr, w.dirs, w.hasParent = layer.xattr, map[string]*layerDir{}, parent != nil
	if parent == nil {
		return nil
	}
	if w.root.lower, err = unix.Openat(parent.FD(), ".", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		w.close()
		return fmt.Errorf("open the parent: %w", err)
	}
	return nil
}

func (w *walker) close() {
	w.forget()
	w.root.close()
}

func (d *layerDir) close() {
	unix.Close(d.fd)
	if d.lower >= 0 {
		unix.Close(d.lower)
	}
}

func (w *walker) forget() {
	for _, d := range w.dirs {
		d.close()
	}
	clear(w.dirs)
	w.stale = false
}

// refresh is called between entries, when nobody holds a directory.
func (w *walker) refresh() {
	if w.stale || len(w.dirs) > maxOpenDirs {
		w.forget()
	}
}

// dir returns the directory that name leads to, from the root and following
// symlinks as a process in the snapshot would. Directories that only the parent
// has are made in the layer; what is missing is made if create is set, and an
// error if not.
func (w *walker) dir(name string, create bool) (*layerDir, error) {
	// The usual case: the directory is open, and no symlink is involved, as
	// only real paths are in the table.
	if name == "/" {
		return w.root, nil
	}
	if d := w.dirs[name]; d != nil {
		return d, nil
	}
	todo := splitPath(name)
	d, links := w.root, 0
	for len(todo) > 0 {
		step := todo[0]
		todo = todo[1:]
		if step == ".." {
			if d.parent != nil {
				d = d.parent
			}
			continue
		}
		next, err := w.child(d, step, create)
		var link symlinkError
		if errors.As(err, &link) {
			if links++; links > maxSymlinks {
				return nil, fmt.Errorf("directory %s: %w", name, unix.ELOOP)
			}
			if strings.HasPrefix(string(link), "/") {
				d = w.root
			}
			todo = append(splitPath(string(link)), todo...)
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("directory %s%s: %w", d.path, step, err)
		}
		d = next
	}
	return d, nil
}

// splitPath returns the steps of a path.
func splitPath(p string) []string {
	var out []string
	for step := range strings.SplitSeq(p, "/") {
		if step != "" && step != "." {
			out = append(out, step)
		}
	}
	return out
}

// symlinkError says where to go on.
type symlinkError string

func (e symlinkError) Error() string { return "symlink to " + string(e) }

// child returns the directory name in d, or a symlinkError.
func (w *walker) child(d *layerDir, name string, create bool) (*layerDir, error) {
	path := d.path + name + "/"
	if c := w.dirs[path]; c != nil {
		return c, nil
	}
	if len(path) > unix.PathMax {
		return nil, unix.ENAMETOOLONG // and more open directories than is good
	}
	var st unix.Stat_t
	err := files.Lstat(d.fd, name, &st)
	switch {
	case err == nil && files.IsDir(&st):
		return w.enter(d, name)
	case err == nil && files.IsLink(&st):
		return nil, readSymlink(d.fd, name)
	case err == nil && isWhiteout(&st):
		if !create {
			return nil, unix.ENOENT
		}
		if err := unix.Unlinkat(d.fd, name, 0); err != nil {
			return nil, err
		}
		return w.makeDir(d, name, true)
	case err == nil:
		return nil, unix.ENOTDIR
	case err != unix.ENOENT:
		return nil, err
	}
	if d.lower < 0 {
		err = unix.ENOENT
	} else {
		err = files.Lstat(d.lower, name, &st)
	}
	switch {
	case err == nil && files.IsDir(&st), err == unix.ENOENT && create:
		return w.makeDir(d, name, false)
	case err == nil && files.IsLink(&st):
		return nil, readSymlink(d.lower, name)
	case err == nil:
		return nil, unix.ENOTDIR
	}
	return nil, err
}

func readSymlink(dir int, name string) error {
	link, err := files.Readlink(dir, name)
	if err != nil {
		return err
	}
	if link == "" {
		return unix.ENOENT
	}
	return symlinkError(link)
}

// enter opens the directory name, which is in the layer.
func (w *walker) enter(d *layerDir, name string) (*layerDir, error) {
	c := &layerDir{path: d.path + name + "/", lower: -1, parent: d}
	var err error
	if c.fd, err = files.OpenDir(d.fd, name); err != nil {
		return nil, err
	}
	if d.lower >= 0 {
		if err := w.findLower(d, c, name); err != nil {
			unix.Close(c.fd)
			return nil, err
		}
	}
	w.dirs[c.path] = c
	return c, nil
}

// findLower sets c.lower if the parent shows through c.
func (w *walker) findLower(d, c *layerDir, name string) error {
	opaque, _, err := files.XattrsOf(c.fd).Get(w.xattr + "opaque")
	if err != nil {
		return err
	}
	if string(opaque) == "y" {
		return nil
	}
	fd, err := unix.Openat(d.lower, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	switch err {
	case nil:
		c.lower = fd
	case unix.ENOENT, unix.ENOTDIR, unix.ELOOP:
	default:
		return err
	}
	return nil
}

// makeDir makes the directory name, which isn't in the layer. It looks like the
// parent's, unless that was hidden, in which case it must stay so, whatever the
// layer may be stacked on.
func (w *walker) makeDir(d *layerDir, name string, hidden bool) (*layerDir, error) {
	if err := unix.Mkdirat(d.fd, name, 0o700); err != nil {
		return nil, err
	}
	c, err := w.enter(d, name)
	if err != nil {
		return nil, err
	}
	if hidden {
		if err := w.setOpaque(c); err != nil {
			return nil, err
		}
	}
	if c.lower >= 0 {
		return c, w.copyLower(c)
	}
	w.onMkdir(c, w.stamp)
	if err := unix.Fchown(c.fd, 0, 0); err != nil { // not the group of a set-gid directory
		return nil, err
	}
	return c, unix.Fchmod(c.fd, 0o755)
}

// copyLower gives c the metadata that it has in the parent.
func (w *walker) copyLower(c *layerDir) error {
	from, err := files.OpenDir(c.lower, ".")
	if err != nil {
		return err
	}
	defer unix.Close(from)
	var st unix.Stat_t
	if err := unix.Fstat(from, &st); err != nil {
		return err
	}
	w.onMkdir(c, dirTimes{st.Atim, st.Mtim})
	if err := unix.Fchown(c.fd, int(st.Uid), int(st.Gid)); err != nil {
		return fmt.Errorf("chown: %w", err)
	}
	if c.inherited, err = copyXattrs(files.XattrsOf(from), files.XattrsOf(c.fd)); err != nil {
		return err
	}
	return unix.Fchmod(c.fd, st.Mode&0o7777)
}

// setOpaque hides the parent's directory behind d.
func (w *walker) setOpaque(d *layerDir) error {
	if err := unix.Fsetxattr(d.fd, w.xattr+"opaque", []byte("y"), 0); err != nil {
		return fmt.Errorf("mark %s as opaque: %w", d.path, err)
	}
	if d.lower >= 0 {
		unix.Close(d.lower)
		d.lower = -1
	}
	w.stale = true // directories in it may be open with their parent's
	return nil
}

// makeWhiteout hides name of the parent's directory.
func (w *walker) makeWhiteout(d *layerDir, name string) error {
	if !d.listed && d != w.root {
		// Overlay filters whiteouts from listings of merged directories only,
		// and of those copied up, which this marks: d may be stacked onto
		// something that has no such directory.
		if err := unix.Fsetxattr(d.fd, w.xattr+"origin", nil, 0); err != nil {
			return fmt.Errorf("mark %s as copied up: %w", d.path, err)
		}
		d.listed = true
	}
	if err := unix.Mknodat(d.fd, name, unix.S_IFCHR, 0); err != nil {
		return fmt.Errorf("make a whiteout: %w", err)
	}
	return nil
}

// remove removes name from the layer, with all that is in it.
func (w *walker) remove(d *layerDir, name string, st *unix.Stat_t) error {
	if !files.IsDir(st) {
		// A symlink may have led to a directory.
		return unix.Unlinkat(d.fd, name, 0)
	}
	w.stale = true
	return files.RemoveAll(d.fd, name)
}

// copyUp copies the parent's file name into the layer and describes it.
func (w *walker) copyUp(ctx context.Context, d *layerDir, name string, st *unix.Stat_t) error {
	if d.lower < 0 {
		return unix.ENOENT
	}
	if err := files.Lstat(d.lower, name, st); err != nil {
		return err
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return unix.EISDIR
	case unix.S_IFREG:
		return copyRegular(ctx, d, name, st)
	case unix.S_IFLNK:
		link, err := files.Readlink(d.lower, name)
		if err != nil {
			return err
		}
		if err := unix.Symlinkat(link, d.fd, name); err != nil {
			return err
		}
	default:
		if err := unix.Mknodat(d.fd, name, st.Mode, int(st.Rdev)); err != nil {
			return err
		}
		if err := chmodAt(d.fd, name, st.Mode&0o7777); err != nil {
			return err
		}
	}
	if err := unix.Fchownat(d.fd, name, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	lower := &layerDir{fd: d.lower}
	if _, err := copyXattrs(lower.entry(name), d.entry(name)); err != nil {
		return err
	}
	return unix.UtimesNanoAt(d.fd, name, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
}

func copyRegular(ctx context.Context, d *layerDir, name string, st *unix.Stat_t) (err error) {
	from, err := files.OpenFile(d.lower, name)
	if err != nil {
		return err
	}
	defer unix.Close(from)
	to, err := unix.Openat(d.fd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := unix.Close(to); err == nil {
			err = cerr
		}
	}()
	if err := new(files.Copier).Copy(ctx, to, from, st); err != nil {
		return err
	}
	return copyMeta(from, to)
}
