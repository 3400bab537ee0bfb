// Package harness starts what end-to-end tests and benchmarks need beside the
// daemon under test: registries, certificates, and other processes.
package harness

import (
	"net"
	"os"
	"strconv"
	"sync"
	"time"
)

// freeAddress is an address on loopback that nobody listens on yet.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// slowness is how much longer than usual the machine may take, such as one with
// an emulated processor.
var slowness = sync.OnceValue(func() time.Duration {
	n, err := strconv.Atoi(os.Getenv("KILN_TEST_SLOWNESS"))
	if err != nil {
		return 1
	}
	return time.Duration(max(n, 1))
})

// Slow is what d is on this machine: d itself, or a multiple of it on a slow one.
func Slow(d time.Duration) time.Duration { return d * slowness() }

// Nobody is an address on loopback that nobody listens on: its port isn't one that is
// given to who asks for any.
const Nobody = "127.0.0.1:1"

// Patience is how long what another process is about to do may take: far longer than
// it does on the slowest machine, to tell what hangs.
const Patience = 2 * time.Minute

// WaitFor asks again and again until ok returns nil, for what another process
// is about to do. After d, or a multiple of it on a slow machine, it returns ok's
// last error.
func WaitFor(d time.Duration, ok func() error) error {
	deadline := time.Now().Add(Slow(d))
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ok()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		<-tick.C
	}
}
