package contenthash

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// fakeRecord is a record on a plain directory.
type fakeRecord struct {
	id  string
	dir string // "" fails the test when opened

	mu    sync.Mutex // guards the fields below
	meta  map[string][]byte
	opens int
}

func newRecord(t testing.TB, dir string) *fakeRecord {
	return &fakeRecord{id: t.Name() + dir + fmt.Sprint(recordCount()), dir: dir, meta: map[string][]byte{}}
}

var (
	recordMu sync.Mutex
	records  int
)

func recordCount() int {
	recordMu.Lock()
	defer recordMu.Unlock()
	records++
	return records
}

func (r *fakeRecord) ID() string { return r.id }

func (r *fakeRecord) Metadata(key string) ([]byte, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	v, ok := r.meta[key]
	return v, ok
}

func (r *fakeRecord) SetMetadata(key string, value []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.meta[key] = value
}

func (r *fakeRecord) openRoot(context.Context) (rootDir, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.opens++
	if r.dir == "" {
		return rootDir{}, errors.New("nothing to open")
	}
	fd, err := unix.Open(r.dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	return rootDir{fd: fd, close: func() error { return unix.Close(fd) }}, err
}

// golden reads testdata/golden.json: trees, questions and the answers of the
// peer's contenthash package (v0.33.1), asked through its CacheContext on a
// bind mount of the tree or, for recorded ones, after a HandleChange for every
// entry, with a fresh context for every question.
func golden(t testing.TB) []specTree {
	t.Helper()
	data, err := os.ReadFile("testdata/golden.json")
	if err != nil {
		t.Fatal(err)
	}
	var trees []specTree
	if err := json.Unmarshal(data, &trees); err != nil {
		t.Fatal(err)
	}
	if len(trees) < 40 {
		t.Fatalf("only %d trees", len(trees))
	}
	return trees
}

func (q *specQuery) ask(rec record) (digest.Digest, error) {
	return checksum(context.Background(), rec, latin(q.Path), Options{FollowLinks: q.Follow, Wildcard: q.Wildcard,
		IncludePatterns: latins(q.Include), ExcludePatterns: latins(q.Exclude), RequiredPaths: latins(q.Required)})
}

func (q *specQuery) check(t *testing.T, rec record) {
	t.Helper()
	got, err := q.ask(rec)
	switch {
	case q.Err == "" && err != nil:
		t.Errorf("%+v: %v", *q, err)
	case q.Err == "" && got != digest.Digest(q.Want):
		t.Errorf("%+v: got %s", *q, got)
	case q.Err != "" && err == nil:
		t.Errorf("%+v: no error but %s", *q, got)
	case strings.HasSuffix(q.Err, ": not found"):
		if !errors.Is(err, fs.ErrNotExist) || err.Error() != q.Err {
			t.Errorf("%+v: error %q", *q, err)
		}
	}
}

// record sends the tree entry by entry, last links first if it is asked to.
func (s *specTree) record(t testing.TB, rec *fakeRecord) {
	t.Helper()
	r, err := newRecorder(rec)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range s.Entries {
		r.Set(e.entry(t))
	}
	if err := r.save(rec); err != nil {
		t.Fatal(err)
	}
}

func (e *specEntry) entry(t testing.TB) Entry {
	st := unix.Stat_t{Mode: e.Mode, Uid: e.UID, Gid: e.GID, Size: int64(len(latin(e.Data)))}
	out := entryOf(&st, latin(e.Link), nil)
	out.Mode = out.Mode&^0o777 | fs.FileMode(e.Mode&0o777) // entryOf makes that of links 0777
	out.Path, out.DevMajor, out.DevMinor = latin(e.Path), int64(e.Major), int64(e.Minor)
	for k, v := range e.Xattrs {
		if out.Xattrs == nil {
			out.Xattrs = map[string][]byte{}
		}
		out.Xattrs[k] = []byte(latin(v))
	}
	h, err := Header(out)
	if err != nil {
		t.Fatal(err)
	}
	d := sum(sha256.Sum256(append(h, latin(e.Data)...)))
	out.Digest = d.digest()
	return out
}

// compat: LLB-177
func TestGolden(t *testing.T) {
	unix.Umask(0)
	for _, tree := range golden(t) {
		t.Run(tree.Name, func(t *testing.T) {
			dir := ""
			if !tree.Recorded {
				dir = tree.build(t)
			}
			fresh := func() *fakeRecord {
				rec := newRecord(t, dir)
				if tree.Recorded {
					tree.record(t, rec)
				}
				return rec
			}
			one := fresh()
			for _, q := range tree.Queries {
				q.check(t, fresh()) // from nothing
				q.check(t, one)     // with what others found out
			}
			shared.forget(one.id)
			opens := one.opens
			for _, q := range tree.Queries {
				q.check(t, one) // from what is stored
			}
			if one.opens != opens {
				t.Errorf("files were opened %d more times although all is known", one.opens-opens)
			}
		})
	}
}
