//go:build linux

// Package thread runs functions that leave their thread in a state that
// nothing else may ever run in, such as another namespace.
package thread

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Run runs fn on an operating system thread of its own, which ends with fn.
//
// It is never the process's first thread: /proc/self stands for that one, and
// it can't end.
func Run(fn func()) {
	done := make(chan struct{})
	go start(fn, done)
	<-done
}

func start(fn func(), done chan<- struct{}) {
	runtime.LockOSThread()
	if unix.Gettid() != unix.Getpid() {
		defer close(done)
		fn()
		return // still locked: the runtime ends the thread
	}
	// As long as this goroutine holds the first thread, another gets another.
	locked := make(chan struct{})
	go func() {
		runtime.LockOSThread()
		close(locked)
		defer close(done)
		fn()
	}()
	<-locked
	runtime.UnlockOSThread()
}
