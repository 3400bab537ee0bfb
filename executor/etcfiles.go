package executor

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"unicode"
)

// generateHosts makes the hosts file of a container. A name is one word, so that
// it is all that its line names.
func generateHosts(hostname string, extra []HostIP) ([]byte, error) {
	if hostname == "" {
		hostname = defaultHostname
	}
	if !isHostName(hostname) {
		return nil, fmt.Errorf("host name %q: it must be one word", hostname)
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "127.0.0.1\tlocalhost %s\n::1\tlocalhost ip6-localhost ip6-loopback\n", hostname)
	for _, h := range extra {
		if !isHostName(h.Host) {
			return nil, fmt.Errorf("extra host %q: its name must be one word", h.Host)
		}
		addr, ok := netip.AddrFromSlice(h.IP)
		if !ok {
			return nil, fmt.Errorf("extra host %s: it has no IP address", h.Host)
		}
		fmt.Fprintf(&b, "%s\t%s\n", addr.Unmap(), h.Host)
	}
	return b.Bytes(), nil
}

func isHostName(name string) bool {
	return name != "" && !strings.ContainsFunc(name, func(c rune) bool { return unicode.IsSpace(c) || unicode.IsControl(c) || c == '#' })
}

// unusedFiles is how many generated files without a user are kept.
const unusedFiles = 32

// fileStore keeps generated files, named by their content, for containers to
// mount read-only. Equal content is one file.
type fileStore struct {
	dir string

	mu     sync.Mutex // guards users and unused; held while a file is written or removed, which is memory only
	users  map[string]int
	unused []string // oldest first
}

func newFileStore(dir string) (*fileStore, error) {
	if err := os.RemoveAll(dir); err != nil {
		return nil, fmt.Errorf("remove old generated files: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make directory for generated files: %w", err)
	}
	return &fileStore{dir: dir, users: map[string]int{}}, nil
}

// get returns the path of a file with content; release says that it isn't
// needed any more.
func (s *fileStore) get(content []byte) (path string, release func() error, err error) {
	sum := sha256.Sum256(content)
	path = filepath.Join(s.dir, hex.EncodeToString(sum[:16]))
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, known := s.users[path]; !known {
		if err := os.WriteFile(path, content, 0o644); err != nil {
			return "", nil, fmt.Errorf("write generated file: %w", err)
		}
		if err := os.Chmod(path, 0o644); err != nil { // whatever the umask is
			return "", nil, fmt.Errorf("write generated file: %w", err)
		}
	}
	s.users[path]++
	return path, func() error { return s.release(path) }, nil
}

func (s *fileStore) release(path string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.users[path]--; s.users[path] > 0 {
		return nil
	}
	s.unused = slices.DeleteFunc(s.unused, func(p string) bool { return p == path })
	s.unused = append(s.unused, path)
	if len(s.unused) <= unusedFiles {
		return nil
	}
	oldest := s.unused[0]
	s.unused = s.unused[1:]
	if n, known := s.users[oldest]; !known || n > 0 {
		return nil // removed before, or in use again
	}
	delete(s.users, oldest)
	if err := os.Remove(oldest); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove generated file: %w", err)
	}
	return nil
}
