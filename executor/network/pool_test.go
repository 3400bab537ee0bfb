//go:build linux

package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
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
	emptyStat = "sockets: used 0\n"
	usedStat  = "sockets: used 1\n"
	sentStat  = "lo: 0 0 0 0 0 0 0 0 %d 0 0 0 0 0 0 0\n"
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
	if err := os.WriteFile(name+".dev", fmt.Appendf(nil, sentStat, 0), 0o600); err != nil {
		return nil, err
	}
	dev, err := os.Open(name + ".dev")
	if err != nil {
		return nil, err
	}
	file, err := os.Open(f.dir)
	return &Namespace{file: file, sockets: stat, devices: dev, path: name, disconnect: func() error { f.n.Add(-1); return nil }}, err
}

// holding makes a namespace have a socket or none.
func holding(t *testing.T, n *Namespace, stat string) {
	t.Helper()
	must(t, os.WriteFile(n.path, []byte(stat), 0o600))
}

// sending makes a namespace have sent something.
func sending(t *testing.T, n *Namespace) {
	t.Helper()
	must(t, os.WriteFile(n.path+".dev", fmt.Appendf(nil, sentStat, 100), 0o600))
}

func inPool(t *testing.T, ahead int, f *fakes, fn func(p *pool)) {
	t.Helper()
	f.dir = t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		p := newPool(poolConfig{make: f.make, ahead: ahead, keep: remembered, makers: 4, log: discard})
		synctest.Wait()
		fn(p)
		synctest.Wait()
		must(t, p.Close())
		if n := f.n.Load(); n != 0 {
			t.Errorf("%d namespaces are left", n)
		}
		if _, err := p.Take(t.Context(), false); err == nil {
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
		n, err := p.Take(context.Background(), false)
		must(t, err)
		synctest.Wait()
		if made := f.made.Load(); made != 4 {
			t.Errorf("%d were made, with one in use", made)
		}
		n.Release()
		again, err := p.Take(context.Background(), false)
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
		late, err := p.Take(context.Background(), false)
		must(t, err)
		never, err := p.Take(context.Background(), false)
		must(t, err)
		holding(t, late, usedStat)
		holding(t, never, usedStat)
		late.Release()
		never.Release()
		holding(t, late, emptyStat)
		must(t, p.await(context.Background(), func() bool { return p.finished > 0 && p.busy == 0 && len(p.old) == 0 && p.settling == 0 }))
		if n := f.n.Load(); n != 1 {
			t.Errorf("%d are left of one that is empty and one that isn't", n)
		}
		n, err := p.Take(context.Background(), false)
		must(t, err)
		if n != late {
			t.Error("what is empty at last isn't used again")
		}
		n.Release()
	})
}

// Those that are to be removed don't hold up those that are to be made.
func TestPoolMakesBeforeItRemoves(t *testing.T) {
	f := &fakes{}
	inPool(t, 1, f, func(p *pool) {
		n, err := p.Take(context.Background(), false)
		must(t, err)
		synctest.Wait()
		proceed := make(chan struct{})
		p.make = func(ctx context.Context) (*Namespace, error) {
			<-proceed
			return f.make(ctx)
		}
		n.Discard()
		synctest.Wait()
		if n := f.n.Load(); n != 2 {
			t.Errorf("%d are there of one that is ready and one that goes", n)
		}
		close(proceed)
		synctest.Wait()
		if n, made := f.n.Load(), f.made.Load(); n != 2 || made != 3 {
			t.Errorf("%d are there of %d, one of which has gone", n, made)
		}
	})
}

// What has sent something is never used again, whenever that was.
func TestPoolForgetsWhatHasSent(t *testing.T) {
	f := &fakes{}
	inPool(t, 0, f, func(p *pool) {
		var all []*Namespace
		for range 3 {
			n, err := p.Take(context.Background(), false)
			must(t, err)
			all = append(all, n)
		}
		unused, before, after := all[0], all[1], all[2]
		sending(t, before)
		before.Release()
		holding(t, after, usedStat)
		after.Release()
		sending(t, after)
		holding(t, after, emptyStat)
		unused.Release()
		must(t, p.await(context.Background(), func() bool { return p.busy == 0 && len(p.old) == 0 && p.settling == 0 }))
		if n := f.n.Load(); n != 1 {
			t.Errorf("%d are left of one that has sent nothing and two that have", n)
		}
	})
}

func TestPoolKeepsNoMoreThanItMay(t *testing.T) {
	f := &fakes{}
	inPool(t, 2, f, func(p *pool) {
		var all []*Namespace
		for range 2 * remembered {
			n, err := p.Take(context.Background(), false)
			must(t, err)
			all = append(all, n)
		}
		for _, n := range all {
			n.Release()
		}
		must(t, p.await(context.Background(), func() bool { return p.busy == 0 && len(p.old) == 0 && p.settling == 0 }))
		if n := f.n.Load(); n != 2+remembered {
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
		if _, err := p.Take(context.Background(), false); !errors.Is(err, broken) {
			t.Errorf("error %v", err)
		}
		f.err.Store(nil)
		n, err := p.Take(context.Background(), false)
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
					n, err := p.Take(context.Background(), false)
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
		must(t, p.await(context.Background(), func() bool { return p.busy == 0 && len(p.old) == 0 && p.settling == 0 }))
		var all []*Namespace
		for range limit {
			n, err := p.Take(context.Background(), false)
			must(t, err)
			all = append(all, n)
		}
		ctx, cancel := context.WithCancelCause(context.Background())
		cancel(errors.New("gone"))
		all[0].Discard()
		if n, err := p.Take(ctx, false); err == nil {
			n.Discard()
		} else if !strings.Contains(err.Error(), "gone") {
			t.Errorf("a caller that is gone: %v", err)
		}
		for _, n := range all[1:] {
			n.Release()
		}
	})
}

// Whoever finds everything in use waits for as long as somebody may give one back,
// whether it can be used again or not, and no longer.
func TestPoolWaitsForOthers(t *testing.T) {
	const limit = 3
	f := &fakes{limit: limit}
	inPool(t, 1, f, func(p *pool) {
		var all []*Namespace
		for i := range limit {
			n, err := p.Take(context.Background(), i == 0)
			must(t, err)
			all = append(all, n)
		}
		for _, done := range []func(*Namespace){(*Namespace).Release, (*Namespace).Discard} {
			var late *Namespace
			var err error
			var taking sync.WaitGroup
			taking.Go(func() { late, err = p.Take(context.Background(), false) })
			synctest.Wait()
			if late != nil || err != nil {
				t.Fatalf("a fourth of three: %v, %v", late, err)
			}
			done(all[2])
			taking.Wait()
			must(t, err)
			all[2] = late
		}
		ctx, cancel := context.WithCancelCause(context.Background())
		gone := errors.New("gone")
		var err error
		var taking sync.WaitGroup
		taking.Go(func() { _, err = p.Take(ctx, false) })
		synctest.Wait()
		cancel(gone)
		taking.Wait()
		if !errors.Is(err, gone) || !errors.Is(err, errExhausted) {
			t.Errorf("a caller that has waited and is gone: %v", err)
		}
		all[1].Discard()
		all[2].Discard()
		for i := range all[1:] {
			if all[1+i], err = p.Take(context.Background(), true); err != nil {
				t.Fatal(err)
			}
		}
		// Each of them may be waiting for this one.
		if _, err := p.Take(context.Background(), false); err != errExhausted {
			t.Errorf("one more than all who ask for others: %v", err)
		}
		for _, n := range all {
			n.Release()
		}
	})
}

// What others have comes back without a word.
func TestPoolAsksOthersAgain(t *testing.T) {
	f := &fakes{}
	elsewhere := errElsewhere
	f.err.Store(&elsewhere)
	inPool(t, 0, f, func(p *pool) {
		start := time.Now()
		if _, err := p.Take(context.Background(), false); err != errElsewhere {
			t.Errorf("error %v", err)
		}
		if waited := time.Since(start); waited < otherWait {
			t.Errorf("nobody was waited for longer than %v", waited)
		}
		var n *Namespace
		var err error
		var taking sync.WaitGroup
		taking.Go(func() { n, err = p.Take(context.Background(), false) })
		synctest.Wait()
		f.err.Store(nil)
		taking.Wait()
		must(t, err)
		n.Release()
	})
}

// As many as were in use at once are there the next time, until nobody has needed
// as many for a while.
func TestPoolRemembers(t *testing.T) {
	const ahead, wide = 2, 20
	f := &fakes{}
	inPool(t, ahead, f, func(p *pool) {
		takeAll := func() (all []*Namespace) {
			for range wide {
				n, err := p.Take(context.Background(), false)
				must(t, err)
				all = append(all, n)
			}
			return all
		}
		all := takeAll()
		for i, n := range all {
			if i%2 == 0 {
				n.Discard()
			} else {
				n.Release()
			}
		}
		synctest.Wait()
		if n := f.n.Load(); n != wide+ahead {
			t.Errorf("%d are there after %d were used", n, wide)
		}
		made := f.made.Load()
		all = takeAll()
		if n := f.made.Load(); n != made {
			t.Errorf("%d are made while the next %d take theirs", n-made, wide)
		}
		for _, n := range all {
			n.Release()
		}
		time.Sleep(memory)
		synctest.Wait()
		if n := f.n.Load(); n != wide+ahead {
			t.Errorf("%d are left soon after", n)
		}
		time.Sleep(memory)
		synctest.Wait()
		if n := f.n.Load(); n != ahead {
			t.Errorf("%d are left after a while", n)
		}
	})
}

// As few are made at once as is useful, and what is given back meanwhile goes to
// those who wait.
func TestPoolMakesFewAtOnce(t *testing.T) {
	f := &fakes{}
	inPool(t, 0, f, func(p *pool) {
		first, err := p.Take(context.Background(), false)
		must(t, err)
		var making atomic.Int32
		proceed := make(chan struct{})
		p.make = func(ctx context.Context) (*Namespace, error) {
			making.Add(1)
			<-proceed
			return f.make(ctx)
		}
		got := make(chan *Namespace, 10)
		for range cap(got) {
			go func() {
				n, err := p.Take(context.Background(), false)
				if err != nil {
					t.Error(err)
				}
				got <- n
			}()
		}
		synctest.Wait()
		if n := making.Load(); int(n) != p.makers {
			t.Errorf("%d are made at once", n)
		}
		first.Release()
		if n := <-got; n != first {
			t.Error("one that was given back isn't used again at once")
		}
		close(proceed)
		for range cap(got) - 1 {
			(<-got).Release()
		}
		first.Release()
	})
}
