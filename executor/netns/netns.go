//go:build linux

// Package netns makes network namespaces with nothing but loopback, some of
// them ahead: one takes the kernel longer than all other namespaces together.
package netns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"

	"github.com/kilnbuild/kiln/executor/thread"
	"golang.org/x/sys/unix"
)

// ahead is how many namespaces are made before they are needed.
const ahead = 3

// Pool hands out namespaces. Each is used once.
type Pool struct {
	ready  chan *os.File
	stop   context.CancelFunc
	filler sync.WaitGroup
	log    *slog.Logger
}

// New starts to fill a pool.
func New(log *slog.Logger) *Pool {
	ctx, cancel := context.WithCancel(context.Background())
	p := &Pool{ready: make(chan *os.File, ahead), stop: cancel, log: log}
	p.filler.Go(func() { p.fill(ctx) })
	return p
}

// Take returns an open namespace; the caller closes it. It exists until then
// and while a process is in it.
func (p *Pool) Take() (*os.File, error) {
	select {
	case f := <-p.ready:
		return f, nil
	default:
		return create()
	}
}

// Close drops what has been made ahead.
func (p *Pool) Close() error {
	p.stop()
	p.filler.Wait()
	close(p.ready)
	var errs []error
	for f := range p.ready {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

func (p *Pool) fill(ctx context.Context) {
	for ctx.Err() == nil {
		f, err := create()
		if err != nil {
			// Take will meet the same error and report it.
			p.log.Warn("make network namespace ahead", "error", err)
			return
		}
		select {
		case p.ready <- f:
		case <-ctx.Done():
			f.Close()
		}
	}
}

// create makes a namespace on a thread that ends with it, so that no other
// goroutine ever finds itself there.
func create() (*os.File, error) {
	var f *os.File
	var err error
	thread.Run(func() { f, err = unshare() })
	if err != nil {
		return nil, fmt.Errorf("make network namespace: %w", err)
	}
	return f, nil
}

func unshare() (*os.File, error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, fmt.Errorf("unshare: %w", err)
	}
	if err := loopbackUp(); err != nil {
		return nil, fmt.Errorf("set loopback up: %w", err)
	}
	return os.Open("/proc/thread-self/ns/net")
}

func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr)
}
