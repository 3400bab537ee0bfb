//go:build linux

package network

import (
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkMake makes and removes namespaces.
func BenchmarkMake(b *testing.B) {
	zero := 0
	for _, mode := range []Mode{None, Bridge} {
		b.Run(string(mode), func(b *testing.B) {
			n := open(b, b.TempDir(), Config{Mode: mode, PoolSize: &zero})
			make := map[Mode]func() (*Namespace, error){
				None:   func() (*Namespace, error) { return create(func(*Namespace) error { return nil }) },
				Bridge: func() (*Namespace, error) { return n.Default.(*bridge).connect(b.Context()) },
			}[mode]
			var removing time.Duration
			before := processorTime(b)
			for b.Loop() {
				ns, err := make()
				must(b, err)
				start := time.Now()
				must(b, ns.remove())
				removing += time.Since(start)
			}
			b.ReportMetric(float64((processorTime(b)-before).Microseconds())/float64(b.N), "cpu-µs/op")
			b.ReportMetric(float64(removing.Nanoseconds())/float64(b.N), "ns-removing/op")
		})
	}
}

// processorTime is what this process has used, without what the kernel does for it
// in the background. Unlike time it is the same on a machine that is busy.
func processorTime(b *testing.B) time.Duration {
	var u unix.Rusage
	must(b, unix.Getrusage(unix.RUSAGE_SELF, &u))
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkTake takes namespaces and gives them back, to be used again or not.
func BenchmarkTake(b *testing.B) {
	for _, mode := range []Mode{None, Bridge} {
		for name, done := range map[string]func(*Namespace){"release": (*Namespace).Release, "discard": (*Namespace).Discard} {
			b.Run(string(mode)+"/"+name, func(b *testing.B) {
				n := open(b, b.TempDir(), Config{Mode: mode})
				for b.Loop() {
					done(take(b, n.Default))
				}
			})
		}
	}
}

// BenchmarkTakeAtOnce has as many steps as a wide build begins together take a
// namespace each, and then give it back: as the first ones of a daemon, which has
// few made ahead, and again. What each does in its namespace decides what the next
// ones find, who come at once.
func BenchmarkTakeAtOnce(b *testing.B) {
	for _, mode := range []Mode{None, Bridge} {
		for _, steps := range []int{8, 50} {
			b.Run(fmt.Sprintf("%s/%d/first", mode, steps), func(b *testing.B) {
				var w waits
				for b.Loop() {
					n, err := Open(b.TempDir(), Config{Mode: mode}, discard)
					must(b, err)
					idle(b, poolOf(n))
					w.takeAtOnce(b, n, steps, nil)
					must(b, n.Close())
				}
				w.report(b)
			})
			for name, do := range map[string]func(*Namespace){
				"again":        nil,
				"after-lookup": func(n *Namespace) { in(b, n, func() { closeSocket(b, unix.AF_NETLINK) }) },
				"after-packet": func(n *Namespace) { in(b, n, func() { sendPacket(b) }) },
			} {
				b.Run(fmt.Sprintf("%s/%d/%s", mode, steps, name), func(b *testing.B) {
					n := open(b, b.TempDir(), Config{Mode: mode})
					new(waits).takeAtOnce(b, n, steps, nil)
					var w waits
					for b.Loop() {
						idle(b, poolOf(n))
						new(waits).takeAtOnce(b, n, steps, do)
						w.takeAtOnce(b, n, steps, nil)
					}
					w.report(b)
				})
			}
		}
	}
}

// closeSocket opens and closes a socket, as whoever looks up a name does.
func closeSocket(b *testing.B, family int) {
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.Close(fd)
	}
	if err != nil {
		b.Error(err)
	}
}

func sendPacket(b *testing.B) {
	c, err := net.Dial("udp", "127.0.0.1:9")
	if err == nil {
		_, err = c.Write([]byte("x"))
		err = errors.Join(err, c.Close())
	}
	if err != nil {
		b.Error(err)
	}
}

func poolOf(n *Networks) *pool {
	if b, ok := n.Default.(*bridge); ok {
		return b.pool
	}
	return n.Default.(none).pool
}

// waits are in milliseconds.
type waits struct{ all, longest []float64 }

// takeAtOnce has steps take a namespace each, do something in it, and give it back.
func (w *waits) takeAtOnce(b *testing.B, n *Networks, steps int, do func(*Namespace)) {
	each := make([]float64, steps)
	var taking sync.WaitGroup
	taken := make([]*Namespace, steps)
	for i := range steps {
		taking.Go(func() {
			start := time.Now()
			ns, err := n.Default.Take(b.Context(), User{})
			if err != nil {
				b.Error(err)
				return
			}
			taken[i], each[i] = ns, float64(time.Since(start).Microseconds())/1000
		})
	}
	taking.Wait()
	for _, ns := range taken {
		if ns != nil && do != nil {
			do(ns)
		}
	}
	for _, ns := range taken {
		if ns != nil {
			ns.Release()
		}
	}
	w.all, w.longest = append(w.all, each...), append(w.longest, slices.Max(each))
}

func (w *waits) report(b *testing.B) {
	slices.Sort(w.all)
	slices.Sort(w.longest)
	b.ReportMetric(w.all[len(w.all)/2], "median-ms")
	b.ReportMetric(w.longest[len(w.longest)/2], "longest-ms")
}
