package local

import (
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/cache/contenthash"
	"github.com/kilnbuild/kiln/ops/sessiontest"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/filesync"
	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"
	"golang.org/x/sys/unix"
)

// client connects a session that offers dirs, as buildctl does.
func client(t testing.TB, sm *session.Manager, sharedKey string, dirs map[string]string) string {
	t.Helper()
	offered := filesync.StaticDirSource{}
	for name, dir := range dirs {
		tree, err := fsutil.NewFS(dir)
		must(t, err)
		tree, err = fsutil.NewFilterFS(tree, &fsutil.FilterOpt{Map: func(_ string, st *types.Stat) fsutil.MapResult {
			st.Uid, st.Gid = 0, 0
			return fsutil.MapResultKeep
		}})
		must(t, err)
		offered[name] = tree
	}
	if dirs == nil {
		return sessiontest.Connect(t, sm, sharedKey)
	}
	return sessiontest.Connect(t, sm, sharedKey, filesync.NewFSSyncProvider(offered))
}

// manyFiles makes n small files in directories of 40.
func manyFiles(t testing.TB, n, size int) string {
	dir := t.TempDir()
	for i := range n {
		sub := filepath.Join(dir, fmt.Sprintf("pkg%03d/dir%d", i/200, i/40))
		if i%40 == 0 {
			must(t, os.MkdirAll(sub, 0o755))
		}
		data := make([]byte, size/2+i%size)
		for j := range data {
			data[j] = byte(i * j)
		}
		must(t, os.WriteFile(filepath.Join(sub, fmt.Sprintf("file%d.js", i)), data, 0o644))
	}
	return dir
}

// discard is a recorder that only costs what locking does.
type discard struct{ records }

func (d *discard) Set(contenthash.Entry) {
	d.mu.Lock()
	defer d.mu.Unlock()
}
func (d *discard) Remove(string) {}

// BenchmarkTransfer compares with fsutil's receiver, which hashes as upstream
// has it do. The client runs in the same process: its share is in both.
func BenchmarkTransfer(b *testing.B) {
	for _, shape := range []struct {
		name        string
		files, size int
	}{{"20000x10K", 20_000, 10 << 10}, {"4x96M", 4, 96 << 20}} {
		src := manyFiles(b, shape.files, shape.size)
		sm := sessiontest.Manager(b)
		id := client(b, sm, "", map[string]string{"context": src})
		caller, err := sm.Get(b.Context(), id, false)
		must(b, err)
		b.Run(shape.name+"/first/kiln", func(b *testing.B) {
			defer reportCPU(b)()
			for range b.N {
				c := newCopy(b)
				receiveKiln(b, caller, c)
			}
		})
		b.Run(shape.name+"/first/fsutil", func(b *testing.B) {
			defer reportCPU(b)()
			for range b.N {
				receiveFsutil(b, caller, b.TempDir())
			}
		})
		c, dest := newCopy(b), b.TempDir()
		receiveKiln(b, caller, c)
		receiveFsutil(b, caller, dest)
		b.Run(shape.name+"/unchanged/kiln", func(b *testing.B) {
			defer reportCPU(b)()
			for range b.N {
				receiveKiln(b, caller, c)
			}
		})
		b.Run(shape.name+"/unchanged/fsutil", func(b *testing.B) {
			defer reportCPU(b)()
			for range b.N {
				receiveFsutil(b, caller, dest)
			}
		})
	}
}

// reportCPU adds the processor time of both sides, which other load on the
// machine disturbs less than the clock.
func reportCPU(b *testing.B) func() {
	used := func() time.Duration {
		var u unix.Rusage
		must(b, unix.Getrusage(unix.RUSAGE_SELF, &u))
		return time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	start := used()
	return func() { b.ReportMetric(float64((used()-start).Milliseconds())/float64(b.N), "cpu-ms/op") }
}

func receiveKiln(b *testing.B, caller session.Caller, c *copyOf) {
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	i := &instance{name: "context"}
	s, err := i.call(ctx, caller)
	must(b, err)
	r := c.receiver(b)
	open := r.open
	r.open = func() (*place, error) {
		p, err := open()
		p.rec = &discard{}
		return p, err
	}
	must(b, r.run(ctx, s))
	c.state = r.state.encode()
}

func receiveFsutil(b *testing.B, caller session.Caller, dest string) {
	must(b, filesync.FSSync(b.Context(), caller, filesync.FSSendRequestOpt{
		Name: "context", DestDir: dest, CacheUpdater: updater{}, ProgressCb: func(int, bool) {},
	}))
}

type updater struct{}

func (updater) MarkSupported(bool) {}
func (updater) HandleChange(fsutil.ChangeKind, string, os.FileInfo, error) error {
	return nil
}
func (updater) ContentHasher() fsutil.ContentHasher {
	return func(st *types.Stat) (hash.Hash, error) {
		header, err := contenthash.Header(entryOf(st))
		h := sha256.New()
		h.Write(header)
		return h, err
	}
}
