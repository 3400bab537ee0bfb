//go:build linux && (amd64 || arm64)

package executor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// endAmong kills all processes in the mount namespace that /proc calls name, and
// returns when there are none. Where a container has no PID namespace, nothing
// else ends what its first process leaves; and none of its processes can leave
// its mount namespace.
func endAmong(name string) error {
	for deadline := time.Now().Add(killTimeout); ; {
		links, err := filepath.Glob("/proc/[0-9]*/ns/mnt")
		if err != nil {
			return err
		}
		var errs []error
		found := false
		for _, link := range links {
			in := func() bool {
				at, err := os.Readlink(link) // an error means that it has ended
				return err == nil && at == name
			}
			if !in() {
				continue
			}
			found = true
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(filepath.Dir(link))))
			if err != nil {
				return fmt.Errorf("internal error: %s names no process", link)
			}
			if err := killIf(pid, in); err != nil {
				errs = append(errs, fmt.Errorf("end process %d that a step has left: %w", pid, err))
			}
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes that a step has left make more faster than they are ended, for %s", killTimeout)
		}
		// What is made meanwhile is found the next time.
		if !found || len(errs) > 0 {
			return errors.Join(errs...)
		}
	}
}
