package rootless

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// idsFile is in state directories of rootless daemons: the ids that the files
// there belong to. Read with other ids, or as the machine's root, which takes
// other attributes for overlay's, the same files would mean something else.
const idsFile = "rootless-ids"

// Claim makes the state directory this daemon's, or fails if it is that of one
// with other ids.
func Claim(root string) error { return Here().claim(root) }

// Check is Claim of a directory that isn't to be written to.
func Check(root string) error { return Here().check(root) }

func (n *Namespace) claim(root string) error {
	if err := n.check(root); err != nil || !n.Mapped() {
		return err
	}
	file := filepath.Join(root, idsFile)
	if _, err := os.Stat(file); err == nil {
		return nil
	}
	if err := os.MkdirAll(root, 0o711); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	for _, e := range entries {
		if e.Name() != idsFile+".new" { // which a crash leaves
			return fmt.Errorf("state directory %s: it has files, such as %s, that no rootless daemon made; name another one with --root", root, e.Name())
		}
	}
	if err := os.WriteFile(file+".new", []byte(n.String()), 0o644); err != nil {
		return fmt.Errorf("state directory: %w", err)
	}
	return os.Rename(file+".new", file)
}

func (n *Namespace) check(root string) error {
	data, err := os.ReadFile(filepath.Join(root, idsFile))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("state directory: %w", err)
	case !n.Mapped():
		return fmt.Errorf("state directory %s is that of a rootless daemon: use it as the user that it belongs to, or name another one with --root", root)
	case string(data) != n.String():
		return fmt.Errorf("state directory %s was made with other ids than this daemon has; give the user the same ones in /etc/subuid and /etc/subgid, or name another directory with --root\nmade with:\n%shas:\n%s",
			root, data, n)
	}
	return nil
}
