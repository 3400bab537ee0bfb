package snapshot

import (
	"os"
	"sync"
	"testing"
)

// What others find as the mounts of the process, in /proc, are never those of
// the thread, where a part of the machine's is hidden.
func TestMountThreadIsNotTheProcess(t *testing.T) {
	if os.Getuid() != 0 {
		t.Fatal("this test needs root")
	}
	const process = "/proc/self/ns/mnt"
	before, err := os.Readlink(process)
	if err != nil {
		t.Fatal(err)
	}
	// Many at once make sure that some would start on the first thread.
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			var h mountThread
			err := h.do(func() error {
				if own, err := os.Readlink("/proc/thread-self/ns/mnt"); err != nil || own == before {
					t.Errorf("the thread's namespace is %s, %v", own, err)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
				return
			}
			close(h.work) // with which it ends
		})
	}
	wg.Wait()
	if after, err := os.Readlink(process); err != nil || after != before {
		t.Errorf("the process's mount namespace was %s, is %s, %v", before, after, err)
	}
}
