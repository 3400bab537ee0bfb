//go:build linux

package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

// fakes makes namespaces that are only files, and counts those that there are.
type fakes struct {
	dir   string
	n     atomic.Int32 // there are now
	made  atomic.Int32
	limit int32 // 0: none
	err   atomic.Pointer[error]
}

const (
	emptyStat = "sockets: used 0\nTCP: inuse 0 orphan 0 tw 0\n"
	usedStat  = "sockets: used 1\nTCP: inuse 0 orphan 0 tw 0\n"
)

func (f *fakes) make(context.Context) (*Namespace, error) {
	if err := f.err.Load(); err != nil {
		return nil, *err
	}
	if n := f.n.Add(1); f.limit > 0 && n > f.limit {
		f.n.Add(-1)
		return nil, errExhausted
	}
	name := filepath.Join(f.dir, fmt.Sprint(f.made.Add(1)))
	if err := os.WriteFile(name, []byte(emptyStat), 0o600); err != nil {
		return nil, err
	}
	stat, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	file, err := os.Open(f.dir)
	return &Namespace{file: file, sockets: stat, path: name, disconnect: func() error { f.n.Add(-1); return nil }}, err
}

// holding makes a namespace have a socket or none.
func holding(t *testing.T, n *Namespace, stat string) {
	t.Helper()
	must(t, os.WriteFile(n.path, []byte(stat), 0o600))
}

func inPool(t *testing.T, ahead int, f *fakes, fn func(p *pool)) {
	t.Helper()
	f.dir = t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		p := newPool(ahead, usedKept, discard, f.make)
		synctest.Wait()
		fn(p)
		synctest.Wait()
		must(t, p.Close())
		if n := f.n.Load(); n != 0 {
			t.Errorf("%d namespaces are left", n)
		}
		if _, err := p.Take(t.Context()); err == nil {
			t.Error("a closed pool hands out namespaces")
		}
	})
}

func TestPoolIsAhead(t *testing.T) {
	f := &fakes{}
	inPool(t, 3, f, func(p *pool) {
		if n := f.made.Load(); n != 3 {
			t.Errorf("%d were made ahead", n)
		}
		n, err := p.Take(context.Background())
		must(t, err)
		synctest.Wait()
		if made := f.made.Load(); made != 4 {
			t.Errorf("%d were made, with one in use", made)
		}
		n.Release()
		again, err := p.Take(context.Background())
		must(t, err)
		if again != n || f.made.Load() != 4 {
			t.Error("what was used before isn't used first")
		}
		again.Discard()
	})
}

// What has a socket at first may be used again when that is gone.
func TestPoolWaitsForTheKernel(t *testing.T) {
	f := &fakes{}
	inPool(t, 0, f, func(p *pool) {
		late, err := p.Take(context.Background())
		must(t, err)
		never, err := p.Take(context.Background())
		must(t, err)
		holding(t, late, usedStat)
		holding(t, never, usedStat)
		late.Release()
		never.Release()
		holding(t, late, emptyStat)
		must(t, p.await(context.Background(), func() bool { return p.finished == 2 }))
		if n := f.n.Load(); n != 1 {
			t.Errorf("%d are left of one that is empty and one that isn't", n)
		}
		n, err := p.Take(context.Background())
		must(t, err)
		if n != late {
			t.Error("what is empty at last isn't used again")
		}
		n.Release()
	})
}

func TestPoolKeepsNoMoreThanItMay(t *testing.T) {
	f := &fakes{}
	inPool(t, 2, f, func(p *pool) {
		var all []*Namespace
		for range 2 * usedKept {
			n, err := p.Take(context.Background())
			must(t, err)
			all = append(all, n)
		}
		for _, n := range all {
			n.Release()
		}
		must(t, p.await(context.Background(), func() bool { return p.busy == 0 && len(p.old) == 0 }))
		if n := f.n.Load(); n != usedKept {
			t.Errorf("%d are kept", n)
		}
	})
}

// Whoever makes namespaces ahead doesn't try again and again.
func TestPoolAfterAnError(t *testing.T) {
	f := &fakes{}
	broken := errors.New("broken")
	f.err.Store(&broken)
	inPool(t, 2, f, func(p *pool) {
		if _, err := p.Take(context.Background()); !errors.Is(err, broken) {
			t.Errorf("error %v", err)
		}
		f.err.Store(nil)
		n, err := p.Take(context.Background())
		must(t, err)
		synctest.Wait()
		if made := f.made.Load(); made != 3 {
			t.Errorf("after the error %d were made", made)
		}
		n.Discard()
	})
}

// However many take and give back at once, nobody finds a pool exhausted in
// which there is one for each.
func TestPoolAtItsLimit(t *testing.T) {
	const limit = 5
	f := &fakes{limit: limit}
	inPool(t, 2, f, func(p *pool) {
		var wg sync.WaitGroup
		for i := range limit {
			wg.Go(func() {
				for j := range 40 {
					n, err := p.Take(context.Background())
					if err != nil {
						t.Error(err)
						return
					}
					switch (i + j) % 3 {
					case 0:
						n.Discard()
					case 1:
						os.WriteFile(n.path, []byte(usedStat), 0o600) //nolint:errcheck // or it is used again
						n.Release()
					default:
						n.Release()
					}
				}
			})
		}
		wg.Wait()
		must(t, p.await(context.Background(), func() bool { return p.busy == 0 && len(p.old) == 0 }))
		var all []*Namespace
		for range limit {
			n, err := p.Take(context.Background())
			must(t, err)
			all = append(all, n)
		}
		if _, err := p.Take(context.Background()); !errors.Is(err, errExhausted) {
			t.Errorf("one more: %v", err)
		}
		ctx, cancel := context.WithCancelCause(context.Background())
		cancel(errors.New("gone"))
		all[0].Discard()
		if n, err := p.Take(ctx); err == nil {
			n.Discard()
		} else if err.Error() != "gone" {
			t.Errorf("a caller that is gone: %v", err)
		}
		for _, n := range all[1:] {
			n.Release()
		}
	})
}
