//go:build linux && (amd64 || arm64)

package supervisor

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/executor"
)

// cpuTime is what the process pid and the children it waited for have used.
func cpuTime(b *testing.B, pid int) time.Duration {
	b.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	var ticks int64
	for _, f := range strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))[11:15] { // utime, stime, cutime, cstime
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			b.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * (time.Second / 100)
}

// What a step costs in the daemon's own executor and in the supervisor, in CPU
// time of daemon, supervisor and the step itself, which other load on the
// machine changes little, and by the clock.
func BenchmarkStep(b *testing.B) {
	p, _ := newProcess(b, "", "true")
	p.Args = []string{"true"}
	n := 0
	measure := func(b *testing.B, pids []int, step func(executor.Process) error) {
		used := func() (sum time.Duration) {
			for _, pid := range pids {
				sum += cpuTime(b, pid)
			}
			return sum
		}
		before := used()
		for b.Loop() {
			n++
			p.ID = fmt.Sprint("s", n)
			if err := step(p); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64((used()-before).Microseconds())/float64(b.N), "cpu-µs/op")
	}
	b.Run("own", func(b *testing.B) {
		own, err := executor.New(executor.Config{Root: b.TempDir(), CgroupParent: "/kiln/test"})
		if err != nil {
			b.Fatal(err)
		}
		defer own.Close()
		measure(b, []int{os.Getpid()}, func(p executor.Process) error {
			var out bytes.Buffer
			p.Stdout, p.Stderr = &out, &out
			_, err := own.Run(context.Background(), p)
			return err
		})
	})
	b.Run("supervised", func(b *testing.B) {
		c := newClient(b, testConfig(b))
		proc, err := c.use(context.Background())
		if err != nil {
			b.Fatal(err)
		}
		measure(b, []int{os.Getpid(), proc.cmd.Process.Pid}, func(p executor.Process) error {
			_, done, err := c.Run(context.Background(), p, []byte("note"), nil)
			if err == nil {
				done()
			}
			return err
		})
	})
}

// BenchmarkLaunch starts a supervisor, as a daemon does for its first step.
func BenchmarkLaunch(b *testing.B) {
	for b.Loop() {
		c := newClient(b, testConfig(b))
		if _, err := c.use(context.Background()); err != nil {
			b.Fatal(err)
		}
	}
}
