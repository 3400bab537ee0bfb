package contenthash_test

import (
	"bytes"
	"crypto/sha256"
	"os"
	"path/filepath"
	"testing"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/cache/cachetest"
	"github.com/kilnbuild/kiln/cache/contenthash"
	"github.com/opencontainers/go-digest"
)

// transfer writes files to u, as a local source would, and records them.
func transfer(t *testing.T, u *cache.Mutable, files map[string]string) (before []string) {
	t.Helper()
	r, err := contenthash.NewRecorder(u)
	if err != nil {
		t.Fatal(err)
	}
	for e := range r.All() {
		before = append(before, e.Path)
	}
	v, err := u.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(v.Path(), name), []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
		e := contenthash.Entry{Path: name, Mode: 0o644, Size: int64(len(data)), ModTime: 7}
		h, err := contenthash.Header(e)
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(append(bytes.Clone(h), data...))
		e.Digest = digest.NewDigestFromBytes(digest.SHA256, sum[:])
		r.Set(e)
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	if err := r.Save(u); err != nil {
		t.Fatal(err)
	}
	return before
}

// What a Recorder stored beside a real record answers for it, is told to the
// next transfer, survives a restart, and agrees with a scan of the files.
func TestRecordOfCache(t *testing.T) {
	root := t.TempDir()
	m := cachetest.Open(t, root)
	u, err := m.New(t.Context(), nil, cache.Options{Retain: true})
	if err != nil {
		t.Fatal(err)
	}
	id := u.ID()
	if before := transfer(t, u, map[string]string{"a": "1", "b": "2"}); before != nil {
		t.Errorf("a new record holds %v", before)
	}
	sum := func(ref *cache.Ref, p string) digest.Digest {
		t.Helper()
		d, err := contenthash.Checksum(t.Context(), ref, p, contenthash.Options{})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	ref, err := u.Commit(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	a, all := sum(ref, "/a"), sum(ref, "/")
	ref.Release()

	m.Shut()
	contenthash.Rest() // as a daemon that starts has no trees
	m = cachetest.Open(t, root)
	if ref, err = m.Get(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if sum(ref, "/a") != a || sum(ref, "/") != all {
		t.Error("digests changed over a restart")
	}
	ref.SetMetadata("contenthash", nil)
	if got := sum(ref, "/a"); got != a {
		t.Errorf("a scan finds %s, %s was recorded", got, a)
	}
	ref.Release()

	if u, err = m.GetMutable(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	transfer(t, u, map[string]string{"a": "changed"})
	if ref, err = u.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if sum(ref, "/a") == a {
		t.Error("the digest of a changed file is the old one")
	}
	ref.Release()
}
