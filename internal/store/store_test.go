package store

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/bbolt"
)

// manual is a delay that no test waits for: groups are committed by Sync and
// Close alone.
const manual = time.Hour

// warnings collects what a DB warned of.
type warnings struct {
	mu    sync.Mutex
	texts []string
}

func (w *warnings) warn(msg string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.texts = append(w.texts, msg+" "+fmt.Sprint(args...))
}

func (w *warnings) all() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Join(w.texts, "\n")
}

func openAt(t testing.TB, root string, w *warnings) *DB {
	t.Helper()
	opts := Options{Root: root, Delay: manual}
	if w != nil {
		opts.Warn = w.warn
	}
	d, err := Open(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil && !d.broken.Load() {
			t.Errorf("Close: %v", err)
		}
	})
	return d
}

func put(d *DB, bucket, key, value string) {
	b := &Batch{}
	b.Put(bucket, key, []byte(value))
	d.Write(b)
}

func mustSync(t testing.TB, d *DB) {
	t.Helper()
	if err := d.Sync(context.Background()); err != nil {
		t.Fatal(err)
	}
}

func wantValue(t *testing.T, d *DB, bucket, key, want string) {
	t.Helper()
	if got, ok := d.Get(bucket, key); !ok || string(got) != want {
		t.Errorf("Get(%s, %s) = %q, %v, want %q", bucket, key, got, ok, want)
	}
}

func scan(d *DB, bucket, prefix string) string {
	var out []string
	d.Scan(bucket, prefix, func(k string, v []byte) bool {
		out = append(out, k+"="+string(v))
		return true
	})
	return strings.Join(out, " ")
}

func TestReadersSeeWritesAtOnceAndAfterReopen(t *testing.T) {
	root := t.TempDir()
	d := openAt(t, root, nil)
	for _, k := range []string{"b", "a2", "a1", "c"} {
		put(d, "x", k, k)
	}
	b := &Batch{}
	b.Delete("x", "a2")
	b.Delete("none", "a2")
	b.Put("x", "a0", nil)
	d.Write(b)
	check := func(d *DB) {
		t.Helper()
		wantValue(t, d, "x", "a1", "a1")
		wantValue(t, d, "x", "a0", "")
		if _, ok := d.Get("x", "a2"); ok {
			t.Error("a deleted key is there")
		}
		if _, ok := d.Get("y", "a1"); ok {
			t.Error("a key of a bucket that isn't there")
		}
		if got := scan(d, "x", "a"); got != "a0= a1=a1" {
			t.Errorf("scan a: %q", got)
		}
		if got := scan(d, "x", ""); got != "a0= a1=a1 b=b c=c" {
			t.Errorf("scan: %q", got)
		}
	}
	check(d)
	mustSync(t, d)
	check(d)
	put(d, "x", "z", "late") // committed by Close
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = openAt(t, root, nil)
	wantValue(t, d, "x", "z", "late")
	b = &Batch{}
	b.Delete("x", "z")
	d.Write(b)
	check(d)
	if err := d.Check(); err != nil {
		t.Error(err)
	}
}

func TestScanSeesTheStateOfItsCall(t *testing.T) {
	d := openAt(t, t.TempDir(), nil)
	put(d, "x", "a", "1")
	mustSync(t, d)
	put(d, "x", "b", "1")
	var seen []string
	d.Scan("x", "", func(k string, v []byte) bool {
		seen = append(seen, k+string(v))
		put(d, "x", "b", "2")
		put(d, "x", k+"x", "2")
		mustSync(t, d) // would wait for ever, were a transaction open
		return true
	})
	if got := strings.Join(seen, " "); got != "a1 b1" {
		t.Errorf("seen %q", got)
	}
	n := 0
	d.Scan("x", "", func(string, []byte) bool { n++; return false })
	if n != 1 {
		t.Errorf("fn was called %d times after it returned false", n)
	}
}

func TestGroupIsCommittedAfterTheDelay(t *testing.T) {
	d, err := Open(Options{Root: t.TempDir(), Delay: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for range 3 {
		done := make(chan struct{})
		b := &Batch{}
		b.Put("x", "k", []byte("v"))
		b.OnDurable(func() { close(done) })
		d.Write(b)
		<-done
	}
}

// A Sync that comes when the batch is on disk already waits for what the batch does then.
func TestSyncWaitsForOnDurable(t *testing.T) {
	d := openAt(t, t.TempDir(), nil)
	var ran atomic.Bool
	synced := make(chan error, 1)
	var b Batch
	b.Put("b", "k", []byte("v"))
	b.OnDurable(func() {
		go func() {
			err := d.Sync(t.Context())
			if err == nil && !ran.Load() {
				err = errors.New("it was over before OnDurable was")
			}
			synced <- err
		}()
		for range 1000 { // time for one that doesn't wait
			runtime.Gosched()
		}
		ran.Store(true)
	})
	d.Write(&b)
	mustSync(t, d)
	if err := <-synced; err != nil {
		t.Errorf("a Sync beside OnDurable: %v", err)
	}
}

func TestOnDurableRunsInOrderOnceStored(t *testing.T) {
	d := openAt(t, t.TempDir(), nil)
	var order []int
	for i := range 5 {
		b := &Batch{}
		b.Put("x", "k", fmt.Append(nil, i))
		b.OnDurable(func() {
			if err := d.bolt.View(func(tx *bbolt.Tx) error {
				if got := string(tx.Bucket([]byte("x")).Get([]byte("k"))); got != "4" {
					return fmt.Errorf("bbolt has %q", got)
				}
				return nil
			}); err != nil {
				t.Error(err)
			}
			order = append(order, i)
			put(d, "x", "again", "1")
		})
		d.Write(b)
	}
	mustSync(t, d)
	if !slices.Equal(order, []int{0, 1, 2, 3, 4}) {
		t.Errorf("order %v", order)
	}
	wantValue(t, d, "x", "again", "1")
}

func TestFailedCommitKeepsEverythingAndIsTriedAgain(t *testing.T) {
	w := &warnings{}
	d := openAt(t, t.TempDir(), w)
	real, fail := d.persist, 2
	d.persist = func(g *group) error {
		if fail > 0 {
			fail--
			return fmt.Errorf("write: %w", d.explain(syscall.ENOSPC, g))
		}
		return real(g)
	}
	durable := 0
	for i := range 3 {
		b := &Batch{}
		b.Put("x", "k", fmt.Append(nil, i))
		b.Put("x", fmt.Sprint("k", i), nil)
		b.OnDurable(func() { durable++ })
		d.Write(b)
		err := d.Sync(context.Background())
		if (i < 2) != errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("Sync %d: %v", i, err)
		}
		if err != nil && (!strings.Contains(err.Error(), "are free on the file system of "+d.root.Name()) || !strings.Contains(err.Error(), "needs about")) {
			t.Errorf("an error without the numbers: %v", err)
		}
		wantValue(t, d, "x", "k", fmt.Sprint(i))
		if want := []int{0, 0, 3}[i]; durable != want {
			t.Errorf("%d OnDurable calls after commit %d, want %d", durable, i, want)
		}
	}
	if got := scan(d, "x", ""); got != "k=2 k0= k1= k2=" {
		t.Errorf("scan %q", got)
	}
	if n := strings.Count(w.all(), "can't be written"); n != 1 {
		t.Errorf("%d warnings about one streak of failures:\n%s", n, w.all())
	}
	if !strings.Contains(w.all(), "is written again") {
		t.Errorf("no all-clear:\n%s", w.all())
	}
}

// Files are synced for what may point to some; a commit that failed is tried again
// with what it needs.
func TestSyncsFilesForPutsAlone(t *testing.T) {
	d := openAt(t, t.TempDir(), nil)
	real, synced := d.sync, 0
	d.sync = func() error {
		synced++
		return real()
	}
	for _, step := range []struct {
		name string
		fill func(b *Batch)
		want int
	}{
		{"put", func(b *Batch) { b.Put("x", "k", []byte("v")) }, 1},
		{"note", func(b *Batch) { b.Note("x", "n", []byte("v")) }, 1},
		{"deletion", func(b *Batch) { b.Delete("x", "k") }, 1},
		{"both", func(b *Batch) { b.Delete("x", "n"); b.Put("x", "k", nil) }, 2},
	} {
		b := &Batch{}
		step.fill(b)
		d.Write(b)
		if err := d.Sync(t.Context()); err != nil {
			t.Fatal(err)
		}
		if synced != step.want {
			t.Errorf("%s: synced %d times, not %d", step.name, synced, step.want)
		}
	}
	d.sync = func() error { return syscall.EIO }
	put(d, "x", "lost", "v")
	if err := d.Sync(t.Context()); !errors.Is(err, syscall.EIO) {
		t.Errorf("Sync = %v", err)
	}
	d.sync = func() error {
		synced++
		return real()
	}
	b := &Batch{}
	b.Delete("x", "k")
	d.Write(b)
	if err := d.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	if synced != 3 {
		t.Errorf("what failed was written without a sync")
	}
}

func TestCloseReportsWhatItCouldNotWrite(t *testing.T) {
	root := t.TempDir()
	d, err := Open(Options{Root: root, Delay: manual})
	if err != nil {
		t.Fatal(err)
	}
	d.persist = func(*group) error { return syscall.EIO }
	put(d, "x", "k", "v")
	if err := d.Close(); !errors.Is(err, syscall.EIO) {
		t.Errorf("Close = %v", err)
	}
	if err := d.Close(); err != nil {
		t.Errorf("second Close = %v", err)
	}
	put(d, "x", "k2", "v")
	if err := d.Sync(context.Background()); err == nil {
		t.Error("Sync after Close says that all is well")
	}
	if _, ok := openAt(t, root, nil).Get("x", "k"); ok {
		t.Error("a group that failed was stored")
	}
}

func TestSyncHonoursItsContext(t *testing.T) {
	d := openAt(t, t.TempDir(), nil)
	entered, release := make(chan struct{}), make(chan struct{})
	real := d.persist
	d.persist = func(g *group) error {
		close(entered)
		<-release
		d.persist = real
		return real(g)
	}
	put(d, "x", "k", "v")
	ctx, cancel := context.WithCancelCause(context.Background())
	errs := make(chan error)
	go func() { errs <- d.Sync(ctx) }()
	<-entered
	put(d, "x", "k", "v2") // lands in the next group; the old value is in flight
	wantValue(t, d, "x", "k", "v2")
	cause := errors.New("enough")
	cancel(cause)
	if err := <-errs; !errors.Is(err, cause) {
		t.Errorf("Sync = %v", err)
	}
	close(release)
	mustSync(t, d)
	wantValue(t, d, "x", "k", "v2")
}

func TestBatchesThatCannotBeStoredAreDropped(t *testing.T) {
	for name, fill := range map[string]func(*Batch){
		"empty key":       func(b *Batch) { b.Put("x", "", nil) },
		"long key":        func(b *Batch) { b.Delete("x", strings.Repeat("k", bbolt.MaxKeySize+1)) },
		"empty bucket":    func(b *Batch) { b.Put("", "k", nil) },
		"reserved bucket": func(b *Batch) { b.Put(metaBucket, formatKey, nil) },
	} {
		t.Run(name, func(t *testing.T) {
			w := &warnings{}
			d := openAt(t, t.TempDir(), w)
			b := &Batch{}
			b.Put("x", "good", nil)
			fill(b)
			d.Write(b)
			put(d, "x", "other", "1")
			mustSync(t, d)
			if got := scan(d, "x", ""); got != "other=1" {
				t.Errorf("stored %q", got)
			}
			if !strings.Contains(w.all(), "can't be stored") {
				t.Errorf("warned %q", w.all())
			}
		})
	}
}

// TestModel compares random use, with failing commits and crashes, with plain
// maps: what readers see is every write so far, what a crash leaves is the state
// of the last commit.
func TestModel(t *testing.T) {
	for seed := range uint64(8) {
		t.Run(fmt.Sprint("seed", seed), func(t *testing.T) { model(t, seed) })
	}
}

func model(t *testing.T, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 1))
	root := t.TempDir()
	d := openFaulty(t, root, rnd)
	now, onDisk := map[string]string{}, map[string]string{}
	for step := range 400 {
		switch n := rnd.IntN(100); {
		case n < 60:
			b := &Batch{}
			for range 1 + rnd.IntN(8) {
				k := fmt.Sprintf("%02x", rnd.IntN(256))
				if rnd.IntN(3) == 0 {
					b.Delete("m", k)
					delete(now, k)
				} else {
					v := strings.Repeat(fmt.Sprint(step), rnd.IntN(300))
					b.Put("m", k, []byte(v))
					now[k] = v
				}
			}
			d.Write(b)
		case n < 80:
			if err := d.Sync(context.Background()); err == nil {
				onDisk = maps.Clone(now)
			} else if !errors.Is(err, syscall.EIO) {
				t.Fatal(err)
			}
		case n < 95:
			prefix := fmt.Sprintf("%02x", rnd.IntN(256))[:rnd.IntN(3)]
			compareModel(t, d, prefix, now)
		default:
			// A crash: what a new process finds is the file as it is now.
			crashed := t.TempDir()
			data, err := os.ReadFile(filepath.Join(root, fileName))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(crashed, fileName), data, 0o600); err != nil {
				t.Fatal(err)
			}
			root, now = crashed, maps.Clone(onDisk)
			d = openFaulty(t, root, rnd)
			compareModel(t, d, "", now)
		}
	}
	if err := d.Check(); err != nil {
		t.Error(err)
	}
}

// openFaulty opens a DB whose every fourth commit or so fails, some of them
// after bbolt has already been told everything.
func openFaulty(t *testing.T, root string, rnd *rand.Rand) *DB {
	d, err := Open(Options{Root: root, Delay: manual})
	if err != nil {
		t.Fatal(err)
	}
	real := d.persist
	t.Cleanup(func() {
		d.persist = real
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	d.persist = func(g *group) error {
		switch rnd.IntN(8) {
		case 0:
			return syscall.EIO
		case 1:
			return d.bolt.Update(func(tx *bbolt.Tx) error {
				_, err := g.apply(tx)
				return errors.Join(err, syscall.EIO)
			})
		}
		return real(g)
	}
	return d
}

func compareModel(t *testing.T, d *DB, prefix string, want map[string]string) {
	t.Helper()
	var last string
	n := 0
	d.Scan("m", prefix, func(k string, v []byte) bool {
		if k <= last || !strings.HasPrefix(k, prefix) {
			t.Fatalf("scan %q: %q after %q", prefix, k, last)
		}
		last = k
		if w, ok := want[k]; !ok || w != string(v) {
			t.Fatalf("scan: %s = %q, want %q, %v", k, v, w, ok)
		}
		n++
		return true
	})
	for k, v := range want {
		if strings.HasPrefix(k, prefix) {
			n--
			if got, ok := d.Get("m", k); !ok || string(got) != v {
				t.Fatalf("Get(%s) = %q, %v, want %q", k, got, ok, v)
			}
		}
	}
	if n != 0 {
		t.Fatalf("scan %q found %d keys too many", prefix, n)
	}
}

func TestConcurrentUse(t *testing.T) {
	d, err := Open(Options{Root: t.TempDir(), Delay: 100 * time.Microsecond})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 100 {
				k := fmt.Sprintf("%d/%d", w, i)
				put(d, "x", k, k)
				if v, ok := d.Get("x", k); !ok || string(v) != k {
					t.Errorf("%s is %q, %v", k, v, ok)
				}
				n := 0
				d.Scan("x", fmt.Sprintf("%d/", w), func(string, []byte) bool { n++; return true })
				if n != i+1 {
					t.Errorf("scan finds %d keys, want %d", n, i+1)
				}
				if i%25 == 0 {
					mustSync(t, d)
				}
			}
		})
	}
	wg.Wait()
}
