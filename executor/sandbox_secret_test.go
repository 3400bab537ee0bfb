//go:build linux && (amd64 || arm64)

package executor

import (
	"bytes"
	"context"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A process's environment may have secrets in it: whatever a runtime needs to
// know of it, no file on a disk has it.
func TestEnvironmentIsNotOnDisk(t *testing.T) {
	const secret = "hush-of-the-step"
	eachRuntime(t, func(t *testing.T, e *executor) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		p := process(t, "echo ready; read x; [ ${#TOKEN} = 16 ]")
		p.Env = append(p.Env, "TOKEN="+secret)
		r, w := io.Pipe()
		out := newWatch("ready")
		p.Stdin, p.Stdout = r, out
		ended := make(chan error, 1)
		go func() {
			_, err := e.Run(ctx, p)
			ended <- err
		}()
		select {
		case <-out.seen:
		case err := <-ended:
			t.Fatal("the step ended:", err)
		}
		checkNotOnDisk(t, e.cfg.Root, secret)
		if _, err := io.WriteString(w, "x\n"); err != nil {
			t.Error(err)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// checkNotOnDisk fails if a file below dir that isn't in memory holds text.
func checkNotOnDisk(t *testing.T, dir, text string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return err
		}
		var st unix.Statfs_t
		if err := unix.Statfs(path, &st); err != nil {
			return err
		}
		content, err := os.ReadFile(path)
		if bytes.Contains(content, []byte(text)) && st.Type != unix.TMPFS_MAGIC {
			t.Errorf("%s holds the environment and is on a file system of type %#x", path, st.Type)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// What is wrong with a variable is said without its value.
func TestErrorsHaveNoSecrets(t *testing.T) {
	e := newTest(t, Config{})
	for _, kv := range []string{"TOKEN=hush\x00", "hush", "=hush", "hush\x00"} {
		p := process(t, "true")
		p.Env = append(p.Env, kv)
		if _, err := e.Run(t.Context(), p); err == nil || strings.Contains(err.Error(), "hush") {
			t.Errorf("%q: error %v", kv, err)
		}
	}
}
