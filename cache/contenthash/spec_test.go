package contenthash

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// specTree is a file tree and what upstream answers about it.
type specTree struct {
	Name     string
	Recorded bool `json:",omitempty"` // sent entry by entry, not scanned
	RootMode uint32
	Entries  []specEntry
	Queries  []specQuery
}

// specEntry is one file. Mode is as in stat(2), with the type. Strings hold a
// byte per rune, so that names that aren't UTF-8 survive JSON.
type specEntry struct {
	Path   string
	Mode   uint32
	UID    uint32            `json:",omitempty"`
	GID    uint32            `json:",omitempty"`
	Data   string            `json:",omitempty"`
	Link   string            `json:",omitempty"` // of a symlink; of a hard link the file it points to
	Major  uint32            `json:",omitempty"`
	Minor  uint32            `json:",omitempty"`
	Xattrs map[string]string `json:",omitempty"`
}

type specQuery struct {
	Path     string
	Follow   bool     `json:",omitempty"`
	Wildcard bool     `json:",omitempty"`
	Include  []string `json:",omitempty"`
	Exclude  []string `json:",omitempty"`
	Required []string `json:",omitempty"`
	Want     string   `json:",omitempty"`
	Err      string   `json:",omitempty"`
}

// latin turns runes back into the bytes they stand for.
func latin(s string) string {
	b := make([]byte, 0, len(s))
	for _, r := range s {
		b = append(b, byte(r))
	}
	return string(b)
}

func latins(list []string) []string {
	var out []string
	for _, s := range list {
		out = append(out, latin(s))
	}
	return out
}

// needRoot fails a test that makes devices and files of other owners.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root")
	}
}

// build makes the tree in a new directory.
func (s *specTree) build(t testing.TB) string {
	t.Helper()
	needRoot(t)
	root := t.TempDir()
	for _, e := range s.Entries {
		if err := e.make(root); err != nil {
			t.Fatalf("make %s: %v", e.Path, err)
		}
	}
	if err := unix.Chmod(root, s.RootMode); err != nil {
		t.Fatal(err)
	}
	return root
}

func (e *specEntry) make(root string) error {
	p := filepath.Join(root, latin(e.Path))
	switch e.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if err := os.Mkdir(p, 0o700); err != nil {
			return err
		}
	case unix.S_IFLNK:
		if err := os.Symlink(latin(e.Link), p); err != nil {
			return err
		}
	case unix.S_IFREG:
		if e.Link != "" {
			return os.Link(filepath.Join(root, latin(e.Link)), p)
		}
		if err := os.WriteFile(p, []byte(latin(e.Data)), 0o600); err != nil {
			return err
		}
	default:
		if err := unix.Mknod(p, e.Mode, int(unix.Mkdev(e.Major, e.Minor))); err != nil {
			return err
		}
	}
	if err := os.Lchown(p, int(e.UID), int(e.GID)); err != nil {
		return err
	}
	for k, v := range e.Xattrs {
		if err := unix.Lsetxattr(p, k, []byte(latin(v)), 0); err != nil {
			return err
		}
	}
	if e.Mode&unix.S_IFMT == unix.S_IFLNK {
		return nil
	}
	return unix.Chmod(p, e.Mode&0o7777)
}
