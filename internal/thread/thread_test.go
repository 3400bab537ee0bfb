//go:build linux

package thread

import (
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// Many at once make sure that some start on the first thread.
func TestNeverTheFirstThread(t *testing.T) {
	var wg sync.WaitGroup
	for range 200 {
		wg.Go(func() {
			ran := false
			Run(func() {
				ran = true
				if unix.Gettid() == unix.Getpid() {
					t.Error("on the first thread")
				}
			})
			if !ran {
				t.Error("Run returned before its function")
			}
		})
	}
	wg.Wait()
}
