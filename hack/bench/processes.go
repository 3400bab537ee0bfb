package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// process is one of a daemon's.
type process struct{ pid, parent int }

// file reads one of the process's files in /proc. It is nil if the process isn't
// there any more.
func (p process) file(name string) ([]byte, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", p.pid, name))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
		return nil, nil
	}
	return data, err
}

// processes are the daemon and all below it that run: kiln's supervisor, runc,
// and the steps themselves.
func (d *daemon) processes() ([]process, error) {
	all := []process{{pid: int(d.pid.Load())}}
	for i := 0; i < len(all); i++ {
		lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", all[i].pid))
		if err != nil {
			return nil, err
		}
		for _, task := range lists {
			children, err := all[i].file("task/" + filepath.Base(task) + "/children")
			if err != nil {
				return nil, err
			}
			for _, child := range strings.Fields(string(children)) {
				pid, err := strconv.Atoi(child)
				if err != nil {
					return nil, err
				}
				all = append(all, process{pid, all[i].pid})
			}
		}
	}
	return all, nil
}

// cpu is what the daemon, all below it and the processes they waited for have
// used.
func (d *daemon) cpu() (time.Duration, error) {
	all, err := d.processes()
	if err != nil {
		return 0, err
	}
	var ticks int64
	for _, p := range all {
		data, err := p.file("stat")
		if err != nil {
			return 0, err
		}
		if data == nil {
			continue
		}
		fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
		for _, f := range fields[11:15] { // utime, stime, cutime, cstime
			n, err := strconv.ParseInt(f, 10, 64)
			if err != nil {
				return 0, err
			}
			ticks += n
		}
	}
	return time.Duration(ticks) * (time.Second / 100), nil
}

// switches is how often threads of the daemon and of all below it that run have
// given up a processor: all that wakes up does so again.
func (d *daemon) switches() (sum int64, err error) {
	all, err := d.processes()
	if err != nil {
		return 0, err
	}
	for _, p := range all {
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", p.pid))
		if err != nil {
			return 0, err
		}
		for _, task := range tasks {
			status, err := p.file("task/" + filepath.Base(task) + "/status")
			if err != nil {
				return 0, err
			}
			for line := range strings.Lines(string(status)) {
				name, value, _ := strings.Cut(line, ":")
				if !strings.HasSuffix(name, "ctxt_switches") {
					continue
				}
				n, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
				if err != nil {
					return 0, err
				}
				sum += n
			}
		}
	}
	return sum, nil
}

// memoryKB is what the daemon and all below it, but for programs named without,
// have in memory now. What several of them share, as two processes of a program
// do its text, is counted once; so nothing else should run their programs meanwhile.
func (d *daemon) memoryKB(without string) (sum int64, err error) {
	all, err := d.processes()
	if err != nil {
		return 0, err
	}
	for _, p := range all {
		if p.sharesMemory() || without != "" && p.named(without) {
			continue
		}
		data, err := p.file("smaps_rollup")
		if err != nil {
			return 0, err
		}
		_, pss, ok := bytes.Cut(data, []byte("\nPss:"))
		if !ok {
			continue // it has ended
		}
		kb, err := strconv.ParseInt(string(bytes.Fields(pss)[0]), 10, 64)
		if err != nil {
			return 0, err
		}
		sum += kb
	}
	return sum, nil
}

// sharesMemory reports whether the process hasn't executed its own program yet:
// its memory is its parent's, and would be counted again.
func (p process) sharesMemory() bool {
	const kcmpVM = 1
	order, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(p.pid), uintptr(p.parent), kcmpVM, 0, 0, 0)
	return errno == 0 && order == 0
}

func (p process) named(name string) bool {
	comm, err := p.file("comm")
	return err == nil && strings.TrimSpace(string(comm)) == name
}

// memoryWatch looks at a daemon's memory while something runs: the kernel knows
// the peak of a process, but not of what processes share.
type memoryWatch struct {
	peak atomic.Int64 // in KiB
	stop chan struct{}
	done chan struct{}
}

// memoryInterval is how often it looks: each time costs both daemons about a
// millisecond.
const memoryInterval = 25 * time.Millisecond

func (d *daemon) watchMemory() *memoryWatch {
	w := &memoryWatch{stop: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(w.done)
		tick := time.NewTicker(memoryInterval)
		defer tick.Stop()
		for {
			if kb, err := d.memoryKB(""); err == nil { // else it is being restarted
				w.peak.Store(max(w.peak.Load(), kb))
			}
			select {
			case <-tick.C:
			case <-w.stop:
				return
			}
		}
	}()
	return w
}

// end returns the most that was seen, in MiB.
func (w *memoryWatch) end() float64 {
	close(w.stop)
	<-w.done
	return float64(w.peak.Load()) / 1024
}
