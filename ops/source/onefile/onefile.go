// Package onefile writes the states of sources that bring in one file.
package onefile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/internal/files"
	"github.com/kilnbuild/kiln/internal/rootless"
	"github.com/moby/buildkit/solver/pb"
)

// Attrs are what an op says of the file (LLB-095, -112).
type Attrs struct {
	Name           string // safe; "" if the op says none
	Perm, UID, GID int    // Perm 0 is DefaultPerm
}

// DefaultPerm is that of files whose op says none.
const DefaultPerm = 0o600

// ParseAttrs reads http.filename, http.perm, http.uid and http.gid.
func ParseAttrs(attrs map[string]string) (a Attrs, err error) {
	if v, ok := attrs[pb.AttrHTTPFilename]; ok {
		a.Name = SafeName(v)
	}
	for attr, to := range map[string]*int{pb.AttrHTTPPerm: &a.Perm, pb.AttrHTTPUID: &a.UID, pb.AttrHTTPGID: &a.GID} {
		if v, ok := attrs[attr]; ok {
			n, err := strconv.ParseInt(v, 0, 64)
			if err != nil || n < 0 || n > 1<<32-1 {
				return Attrs{}, fmt.Errorf("%s: %q isn't a number in range", attr, v)
			}
			*to = int(n)
		}
	}
	return a, nil
}

// SafeName is what is left of a name once it can't lead anywhere.
func SafeName(s string) string {
	name := path.Base(strings.TrimSpace(s))
	if name == "." || name == ".." || name == "/" || strings.ContainsFunc(name, unicode.IsControl) {
		return "download"
	}
	return name
}

// Write makes the file called name all that u holds. content writes its bytes.
func (a Attrs) Write(ctx context.Context, u *cache.Mutable, name string, mtime time.Time, content func(io.Writer) error) (err error) {
	view, err := u.Open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, view.Close()) }()
	root, err := os.OpenRoot(view.Path())
	if err != nil {
		return err
	}
	defer root.Close()
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := content(f); err != nil {
		return err
	}
	if err := f.Chown(a.UID, a.GID); err != nil {
		return rootless.Here().Explain(err, a.UID, a.GID)
	}
	perm := os.FileMode(DefaultPerm)
	if a.Perm != 0 {
		perm = files.GoPerm(uint32(a.Perm))
	}
	if err := f.Chmod(perm); err != nil {
		return err
	}
	return root.Chtimes(name, mtime, mtime)
}
