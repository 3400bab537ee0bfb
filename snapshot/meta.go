package snapshot

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/kilnbuild/kiln/internal/files"
	"golang.org/x/sys/unix"
)

// overlayXattrs are the prefixes of xattrs that overlay keeps for itself.
var overlayXattrs = []string{"trusted.overlay.", "user.overlay."}

func isOverlayXattr(name string) bool {
	return slices.ContainsFunc(overlayXattrs, func(prefix string) bool { return strings.HasPrefix(name, prefix) })
}

// isWhiteout says whether st is what overlay marks a deletion with.
func isWhiteout(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}

// copyMeta gives the file to the owner, xattrs, mode and times of from.
func copyMeta(from, to int) error {
	var st unix.Stat_t
	if err := unix.Fstat(from, &st); err != nil {
		return err
	}
	if err := unix.Fchown(to, int(st.Uid), int(st.Gid)); err != nil {
		return fmt.Errorf("chown: %w", err)
	}
	if _, err := copyXattrs(files.XattrsOf(from), files.XattrsOf(to)); err != nil {
		return err
	}
	// After the owner, whose change takes the set-id bits.
	if err := unix.Fchmod(to, st.Mode&0o7777); err != nil {
		return fmt.Errorf("chmod: %w", err)
	}
	if err := files.SetTimes(to, st.Atim, st.Mtim); err != nil {
		return fmt.Errorf("set times: %w", err)
	}
	return nil
}

// copyXattrs copies all xattrs but overlay's own, and returns their names.
func copyXattrs(from, to files.Xattrs) (copied []string, err error) {
	names, err := from.Names()
	if err != nil {
		return nil, fmt.Errorf("list xattrs: %w", err)
	}
	for _, name := range names {
		if isOverlayXattr(name) {
			continue
		}
		value, ok, err := from.Get(name)
		if err != nil {
			return nil, fmt.Errorf("get xattr %s: %w", name, err)
		}
		if !ok {
			continue
		}
		err = to.Set(name, value)
		if errors.Is(err, unix.ENOTSUP) {
			continue // a label that the file system makes up, the same on both
		}
		if err != nil {
			return nil, fmt.Errorf("set xattr %s: %w", name, err)
		}
		copied = append(copied, name)
	}
	return copied, nil
}
