package local

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/cache/cachetest"
	"github.com/kilnbuild/kiln/cache/contenthash"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/ops/sessiontest"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/filesync"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tonistiigi/fsutil/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// daemon is what a source works with, on a state directory.
type daemon struct {
	*Source
	cache *cache.Manager
	sm    *session.Manager
	close func()
}

func start(t testing.TB, root string) *daemon {
	t.Helper()
	c := cachetest.Open(t, root)
	d := &daemon{cache: c.Manager, close: c.Shut, sm: sessiontest.Manager(t)}
	d.Source = New(Options{Cache: c.Manager, Sessions: d.sm})
	return d
}

func (d *daemon) op(t testing.TB, name string, attrs map[string]string) ops.SourceInstance {
	t.Helper()
	i, err := d.Resolve(&pb.SourceOp{Identifier: "local://" + name, Attrs: attrs}, ocispec.Platform{})
	must(t, err)
	return i
}

// fetch transfers "context" from session id.
func (d *daemon) fetch(t testing.TB, id string, attrs map[string]string) *cache.Ref {
	t.Helper()
	ref, err := d.op(t, "context", attrs).Fetch(t.Context(), session.NewGroup(id))
	must(t, err)
	return ref
}

func treeOf(t testing.TB, ref *cache.Ref) map[string]string {
	t.Helper()
	view, err := ref.Open(t.Context())
	must(t, err)
	defer view.Close()
	return describe(t, view.Path())
}

func check(t testing.TB, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got error %v, want one with %q", err, want)
	}
}

// compat: LLB-098, SES-021, SES-040
func TestReuse(t *testing.T) {
	d, src := start(t, t.TempDir()), t.TempDir()
	write(t, filepath.Join(src, "a"), "one", 0o644)
	write(t, filepath.Join(src, "d/b"), "two", 0o644)
	id := client(t, d.sm, "machine", map[string]string{"context": src})

	first := d.fetch(t, id, nil)
	sameTrees(t, describe(t, src), treeOf(t, first))
	sum, err := contenthash.Checksum(t.Context(), first, "/", contenthash.Options{})
	must(t, err)

	// Unchanged: the same record, whether someone uses it or not, and for
	// another session of the same machine.
	busy := d.fetch(t, id, nil)
	if busy.ID() != first.ID() {
		t.Error("an unchanged directory in use gave another record")
	}
	first.Release()
	other := client(t, d.sm, "machine", map[string]string{"context": src})
	again := d.fetch(t, other, nil)
	if again.ID() != busy.ID() {
		t.Error("an unchanged directory gave another record")
	}
	again.Release()

	// Changed while in use: a fresh copy; the old one stays what it was.
	before := treeOf(t, busy)
	write(t, filepath.Join(src, "a"), "one more", 0o644)
	fresh := d.fetch(t, id, nil)
	if fresh.ID() == busy.ID() {
		t.Fatal("a record in use was changed")
	}
	sameTrees(t, before, treeOf(t, busy))
	sameTrees(t, describe(t, src), treeOf(t, fresh))
	if now, err := contenthash.Checksum(t.Context(), fresh, "/", contenthash.Options{}); err != nil || now == sum {
		t.Errorf("content digest %s, %v, after a change from %s", now, err, sum)
	}
	if now, err := contenthash.Checksum(t.Context(), busy, "/", contenthash.Options{}); err != nil || now != sum {
		t.Errorf("content digest of the old record %s, %v, was %s", now, err, sum)
	}
	busy.Release()
	fresh.Release()

	// Changed while idle: the copy is brought up to date.
	copies := len(d.cache.Search(indexKey, "context::machine"))
	must(t, os.Remove(filepath.Join(src, "a")))
	last := d.fetch(t, id, nil)
	defer last.Release()
	sameTrees(t, describe(t, src), treeOf(t, last))
	if n := len(d.cache.Search(indexKey, "context::machine")); n != copies {
		t.Errorf("%d copies, %d before", n, copies)
	}

	// Another machine, or another hint, is another copy.
	stranger := client(t, d.sm, "elsewhere", map[string]string{"context": src})
	far := d.fetch(t, stranger, nil)
	defer far.Release()
	hinted := d.fetch(t, id, map[string]string{pb.AttrSharedKeyHint: "hint"})
	defer hinted.Release()
	if far.ID() == last.ID() || hinted.ID() == last.ID() || far.ID() == hinted.ID() {
		t.Error("copies are shared that shouldn't be")
	}
}

// TestRestart shows that the copy outlives the daemon.
func TestRestart(t *testing.T) {
	root, src := t.TempDir(), t.TempDir()
	write(t, filepath.Join(src, "a"), "one", 0o644)
	d := start(t, root)
	d.fetch(t, client(t, d.sm, "m", map[string]string{"context": src}), nil).Release()
	want := d.cache.Search(indexKey, "context::m")
	d.close()

	d = start(t, root)
	ref := d.fetch(t, client(t, d.sm, "m", map[string]string{"context": src}), nil)
	defer ref.Release()
	if !slices.Equal(want, []string{ref.ID()}) {
		t.Errorf("got %s, the copies were %q", ref.ID(), want)
	}
	sameTrees(t, describe(t, src), treeOf(t, ref))
}

// TestDamagedCopy shows that a copy that isn't what its state says costs a full
// transfer, not the build.
func TestDamagedCopy(t *testing.T) {
	root, src := t.TempDir(), t.TempDir()
	write(t, filepath.Join(src, "d/e/f"), "one", 0o644)
	d := start(t, root)
	id := client(t, d.sm, "m", map[string]string{"context": src})
	d.fetch(t, id, nil).Release()
	found := must1(filepath.Glob(filepath.Join(root, "snapshots/*/fs/d/e")))
	if len(found) != 1 {
		t.Fatalf("found %q", found)
	}
	must(t, os.RemoveAll(found[0]))
	must(t, os.Symlink(t.TempDir(), found[0]))

	write(t, filepath.Join(src, "d/e/f"), "other", 0o644)
	ref := d.fetch(t, id, nil)
	defer ref.Release()
	sameTrees(t, describe(t, src), treeOf(t, ref))
}

func TestEmptyDirectory(t *testing.T) {
	d, src := start(t, t.TempDir()), t.TempDir()
	id := client(t, d.sm, "m", map[string]string{"context": src})
	ref := d.fetch(t, id, nil)
	defer ref.Release()
	if got := treeOf(t, ref); len(got) != 0 {
		t.Errorf("got %v", got)
	}
	again := d.fetch(t, id, nil)
	defer again.Release()
	if again.ID() != ref.ID() {
		t.Error("two records for an empty directory")
	}
}

// compat: SES-030, SES-031, SES-034, SES-035
func TestPatterns(t *testing.T) {
	d, src := start(t, t.TempDir()), t.TempDir()
	for _, p := range []string{"a.go", "a.txt", "d/b.go", "d/c.txt", "größe/x.go", "keep/y"} {
		write(t, filepath.Join(src, p), p, 0o644)
	}
	must(t, os.Symlink("keep", filepath.Join(src, "link")))
	id := client(t, d.sm, "m", map[string]string{"context": src, "ünïcode": src})
	list := func(v ...string) string { return string(must1(json.Marshal(v))) }
	for _, tt := range []struct {
		name  string
		attrs map[string]string
		want  []string
	}{
		{"include", map[string]string{pb.AttrIncludePatterns: list("**/*.go")}, []string{"a.go", "d", "d/b.go", "größe", "größe/x.go"}},
		{"exclude", map[string]string{pb.AttrExcludePatterns: list("**/*.go", "link", "keep")}, []string{"a.txt", "d", "d/c.txt", "größe"}},
		{"not ASCII", map[string]string{pb.AttrIncludePatterns: list("größe", "a.go")}, []string{"a.go", "größe", "größe/x.go"}},
		{"follow", map[string]string{pb.AttrFollowPaths: list("link/y")}, []string{"keep", "keep/y", "link"}},
	} {
		ref := d.fetch(t, id, tt.attrs)
		if got := slices.Sorted(maps.Keys(treeOf(t, ref))); !slices.Equal(got, tt.want) {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
		ref.Release()
	}
	ref, err := d.op(t, "ünïcode", nil).Fetch(t.Context(), session.NewGroup(id))
	must(t, err)
	ref.Release()
}

// compat: SES-024, SES-025, SES-032, LLB-C09
func TestSessions(t *testing.T) {
	d, src := start(t, t.TempDir()), t.TempDir()
	write(t, filepath.Join(src, "a"), "one", 0o644)
	has := client(t, d.sm, "m", map[string]string{"context": src})
	lacks := client(t, d.sm, "m", map[string]string{"other": src})
	none := client(t, d.sm, "m", nil)
	for name, tt := range map[string]struct {
		named string
		group []string
		want  string
	}{
		"any":                      {"", []string{none, lacks, has}, ""},
		"named":                    {has, nil, ""},
		"named lacks it":           {lacks, []string{has}, ""},
		"nobody has it":            {"", []string{lacks}, `the client doesn't offer a local directory named "context"`},
		"no service":               {"", []string{none}, "the client offers no local files"},
		"no session":               {"", nil, "no active sessions"},
		"named lacks it, no group": {lacks, nil, "no active sessions"},
	} {
		attrs := map[string]string{}
		if tt.named != "" {
			attrs[pb.AttrLocalSessionID] = tt.named
		}
		ref, err := d.op(t, "context", attrs).Fetch(t.Context(), session.NewGroup(tt.group...))
		if tt.want == "" {
			must(t, err)
			ref.Release()
			continue
		}
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want %q", name, err, tt.want)
		}
	}

	// A prefix makes the name another one, for the client, too.
	prefixed := client(t, d.sm, "m", map[string]string{"sub-context": src})
	ref, err := d.op(t, "context", map[string]string{pb.AttrLocalSessionID: "sub:" + prefixed}).Fetch(t.Context(), nil)
	must(t, err)
	ref.Release()
}

// compat: LLB-158
func TestCacheKey(t *testing.T) {
	d := start(t, t.TempDir())
	key := func(attrs map[string]string, ids ...string) string {
		k, more, err := d.op(t, "context", attrs).CacheKey(t.Context(), session.NewGroup(ids...), 0)
		must(t, err)
		if more {
			t.Error("more than one key")
		}
		return k
	}
	sum := func(s string) string { return digest.FromString(s).String() }
	if got, want := key(nil, "s1", "s2"), "session:context:"+sum(`{"SessionID":"s1","IncludePatterns":null,"ExcludePatterns":null,"FollowPaths":null}`); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	got := key(map[string]string{
		pb.AttrLocalSessionID: "p:s3", pb.AttrIncludePatterns: `["a","b"]`, pb.AttrMetadataTransfer: "true", pb.AttrMetadataTransferExclude: `["x"]`,
	}, "s1")
	if want := "session:p-context:" + sum(`{"SessionID":"s3","IncludePatterns":["a","b"],"ExcludePatterns":null,"FollowPaths":null,"MetadataTransfer":true,"MetadataExceptions":["x"]}`); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	_, _, err := d.op(t, "context", nil).CacheKey(t.Context(), nil, 0)
	check(t, err, "without session")

	for attr, value := range map[string]string{
		pb.AttrIncludePatterns: "x", pb.AttrExcludePatterns: "{", pb.AttrFollowPaths: "1", pb.AttrLocalDiffer: "odd", pb.AttrMetadataTransfer: "maybe",
	} {
		_, err := d.Resolve(&pb.SourceOp{Identifier: "local://context", Attrs: map[string]string{attr: value}}, ocispec.Platform{})
		check(t, err, attr)
	}
}

// compat: SES-038
func TestMetadataOnly(t *testing.T) {
	d, src := start(t, t.TempDir()), t.TempDir()
	for _, p := range []string{"a", "d/b", "d/want/c", "z"} {
		write(t, filepath.Join(src, p), p, 0o644)
	}
	id := client(t, d.sm, "m", map[string]string{"context": src})
	attrs := map[string]string{pb.AttrMetadataTransfer: "true", pb.AttrMetadataTransferExclude: `["d/want"]`}
	ref := d.fetch(t, id, attrs)
	got := treeOf(t, ref)
	if names := slices.Sorted(maps.Keys(got)); !slices.Equal(names, []string{metadataName, "d", "d/want", "d/want/c"}) {
		t.Errorf("got %q", names)
	}
	view, err := ref.Open(t.Context())
	must(t, err)
	raw, err := os.ReadFile(filepath.Join(view.Path(), metadataName))
	must(t, err)
	view.Close()
	var listed []string
	for len(raw) > 4 {
		n := int(raw[0]) | int(raw[1])<<8 | int(raw[2])<<16 | int(raw[3])<<24
		var st types.Stat
		must(t, st.UnmarshalVT(raw[4:4+n]))
		listed = append(listed, st.Path)
		raw = raw[4+n:]
	}
	if !slices.Equal(listed, []string{"a", "d", "d/b", "d/want", "d/want/c", "z"}) {
		t.Errorf("listed %q", listed)
	}
	again := d.fetch(t, id, attrs)
	if again.ID() != ref.ID() {
		t.Error("unchanged, but another record")
	}
	again.Release()
	ref.Release()

	must(t, os.Chmod(filepath.Join(src, "z"), 0o600)) // only the listing changes
	changed := d.fetch(t, id, attrs)
	defer changed.Release()
	if next := treeOf(t, changed); next[metadataName] == got[metadataName] {
		t.Error("the listing is the old one")
	}
	full := d.fetch(t, id, nil)
	defer full.Release()
	sameTrees(t, describe(t, src), treeOf(t, full))
}

// breaker is a client that fails in the middle.
type breaker struct{ packets []*types.Packet }

func (b *breaker) Register(s *grpc.Server) { filesync.RegisterFileSyncServer(s, b) }

func (b *breaker) DiffCopy(stream filesync.FileSync_DiffCopyServer) error {
	for _, p := range b.packets {
		if err := stream.Send(p); err != nil {
			return err
		}
	}
	return fmt.Errorf("walk: input/output error")
}

func (b *breaker) TarStream(filesync.FileSync_TarStreamServer) error { return nil }

// compat: SES-041
func TestFailure(t *testing.T) {
	d := start(t, t.TempDir())
	b := &breaker{packets: []*types.Packet{stat("a", 0o644), stat("b", 0o644, size(3))}}
	id := sessiontest.Connect(t, d.sm, "m", b)

	_, err := d.op(t, "context", nil).Fetch(t.Context(), session.NewGroup(id))
	check(t, err, `transfer local directory "context": `)
	check(t, err, "input/output error")
	if ids := d.cache.Search(indexKey, "context::m"); len(ids) != 0 {
		t.Errorf("partial copies are left: %q", ids)
	}
	b.packets = []*types.Packet{stat("../x", 0o644)}
	_, err = d.op(t, "context", nil).Fetch(t.Context(), session.NewGroup(id))
	check(t, err, "not a clean relative path")
	if ids := d.cache.Search(indexKey, "context::m"); len(ids) != 0 {
		t.Errorf("partial copies are left: %q", ids)
	}
}

// compat: SES-042
func TestProgress(t *testing.T) {
	d, src := start(t, t.TempDir()), t.TempDir()
	write(t, filepath.Join(src, "a"), strings.Repeat("x", 100_000), 0o644)
	id := client(t, d.sm, "m", map[string]string{"context": src})
	var mu sync.Mutex
	var seen []*progress.Status
	ctx := progress.With(t.Context(), progress.NewScope(progress.WriterFunc(func(e progress.Event) {
		mu.Lock()
		defer mu.Unlock()
		if e.Status != nil {
			seen = append(seen, e.Status)
		}
	}), "sha256:x"))
	ref, err := d.op(t, "context", nil).Fetch(ctx, session.NewGroup(id))
	must(t, err)
	ref.Release()
	first, last := seen[0], seen[len(seen)-1]
	if first.ID != "transferring context:" || first.Started == nil || first.Completed != nil {
		t.Errorf("first status %+v", first)
	}
	if last.Completed == nil || last.Current < 100_000 || last.Current > 110_000 {
		t.Errorf("last status %+v", last)
	}
}

// TestConcurrent syncs one directory from many goroutines at once while it
// changes: everyone gets a tree that was whole at some time.
func TestConcurrent(t *testing.T) {
	d, src := start(t, t.TempDir()), t.TempDir()
	for i := range 50 {
		write(t, filepath.Join(src, fmt.Sprintf("d%d/f", i)), "x", 0o644)
	}
	id := client(t, d.sm, "m", map[string]string{"context": src})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 4 {
				ref, err := d.op(t, "context", nil).Fetch(t.Context(), session.NewGroup(id))
				if err != nil {
					t.Error(err)
					return
				}
				if n := len(treeOf(t, ref)); n < 100 || n > 108 {
					t.Errorf("%d entries", n)
				}
				ref.Release()
				if err := os.WriteFile(filepath.Join(src, fmt.Sprintf("new%d", i)), nil, 0o600); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	ref := d.fetch(t, id, nil)
	defer ref.Release()
	sameTrees(t, describe(t, src), treeOf(t, ref))
}

func TestHeaders(t *testing.T) {
	md := metadata.MD{}
	addValues(md, "none", nil)
	addValues(md, "plain", []string{"a b", "c%d"})
	addValues(md, "other", []string{"a b", "ü"})
	want := metadata.MD{"plain": {"a b", "c%d"}, "other": {"a+b", "%C3%BC"}, "other-encoded": {"1"}}
	if fmt.Sprint(md) != fmt.Sprint(want) {
		t.Errorf("got %v, want %v", md, want)
	}
}
