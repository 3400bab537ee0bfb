//go:build linux && (amd64 || arm64)

package executor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// raceTime is how long each race is tried, and raceLimit how long if nothing of
// it could be seen until then.
const (
	raceTime  = time.Second
	raceLimit = 30 * time.Second
)

// swap exchanges two names all the time until ctx ends, as another step that
// shares the directory could.
func swap(ctx context.Context, a, b string) error {
	for ctx.Err() == nil {
		if err := unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE); err != nil {
			return err
		}
	}
	return nil
}

// Mount points, working directory and selector are below a directory that
// somebody turns into a symbolic link and back while the step is set up.
func TestSymlinkRaces(t *testing.T) {
	e := newTest(t, Config{})
	dir, link := hostDir(t)
	lower, src := busyboxRoot(t), t.TempDir()
	if err := os.WriteFile(filepath.Join(src, "f"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	targets := []string{link, link + "/..", "/proc/self/fd", "/proc/sys", "/proc/1", "/sys/fs/cgroup", strings.Repeat("../", 20) + strings.TrimPrefix(dir, "/"), dir}
	for i, change := range []func(p *Process, cache string){
		func(p *Process, _ string) {
			p.Mounts = append(p.Mounts, Mount{Dest: "/c/d/new/x", Source: bindMount(src)}, Mount{Dest: "/c/d/sub", Source: bindMount(src)})
		},
		func(p *Process, _ string) {
			p.Mounts = append(p.Mounts, Mount{Dest: "/c/d/new-file", Source: bindMount(src), Selector: "f"})
			p.Cwd = "/c/d/cwd"
		},
		func(p *Process, cache string) {
			p.Mounts = append(p.Mounts, Mount{Dest: "/s", Source: bindMount(cache), Selector: "d"}, Mount{Dest: "/t", Source: bindMount(cache), Selector: "d/sub/.."})
		},
	} {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			ran, refused := 0, 0
			begun := time.Now()
			open := func() bool { return ran > 0 && refused > 0 }
			for n := 0; time.Since(begun) < raceTime || !open() && time.Since(begun) < raceLimit; n++ {
				cache := t.TempDir()
				mkdir(t, filepath.Join(cache, "d/sub"))
				if err := os.Symlink(targets[n%len(targets)], filepath.Join(cache, "l")); err != nil {
					t.Fatal(err)
				}
				swapping, stop := context.WithCancel(t.Context())
				var attacker sync.WaitGroup
				attacker.Go(func() {
					if err := swap(swapping, filepath.Join(cache, "d"), filepath.Join(cache, "l")); err != nil {
						t.Error(err)
					}
				})
				for range 8 {
					p := Process{ID: newID(), Args: []string{"sh", "-c", "cat secret ../secret /s/secret /t/secret /c/d/secret; [ $(head -c 1 /proc/timer_list | wc -c) = 0 ] || echo unmasked; (: >> /proc/sys/kernel/core_pattern) && echo writable; true"}, Env: []string{"PATH=/bin"}}
					p.Root, _ = overlay(t, lower)
					p.Mounts = []Mount{{Dest: "/c", Source: bindMount(cache)}}
					change(&p, cache)
					r := attack(t, e, p)
					var exit *ExitError
					if r.err == nil {
						ran++
					} else if refused++; errors.As(r.err, &exit) {
						t.Errorf("the step failed by itself: %v: %s", r.err, r.stderr)
					}
					if r.stdout != "" {
						t.Errorf("link to %s: the step says %q", targets[n%len(targets)], r.stdout)
					}
				}
				stop()
				attacker.Wait()
				checkUntouched(t, dir)
			}
			t.Logf("%d steps ran, %d were refused", ran, refused)
			if !open() {
				t.Errorf("the race was never open: %d steps ran, %d were refused", ran, refused)
			}
		})
	}
}

// The same with a step for attacker, which has a part of the victim's files.
func TestStepAttacksStep(t *testing.T) {
	e := newTest(t, Config{})
	dir, link := hostDir(t)
	cache, lower, src := t.TempDir(), busyboxRoot(t), t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), raceTime)
	defer cancel()
	ended := errors.New("the race is over")
	attackerCtx, stop := context.WithCancelCause(t.Context())
	var attacker sync.WaitGroup
	attacker.Go(func() {
		p := process(t, "cd /c; while :; do ln -s "+link+" d; rm -f d; mkdir d; busybox rmdir d d/x d/x/y; busybox mkfifo d/f; rm -rf d; done 2>/dev/null")
		p.Mounts = []Mount{{Dest: "/c", Source: bindMount(cache)}}
		if _, err := e.Run(attackerCtx, p); !errors.Is(err, ended) {
			t.Errorf("the attacking step: %v", err)
		}
	})
	steps := 0
	for ; ctx.Err() == nil; steps++ {
		p := Process{ID: newID(), Args: []string{"sh", "-c", "cat secret ../secret; true"}, Env: []string{"PATH=/bin"}, Cwd: "/c/d/x"}
		p.Root, _ = overlay(t, lower)
		p.Mounts = []Mount{{Dest: "/c", Source: bindMount(cache)}, {Dest: "/c/d/x/y", Source: bindMount(src)}, {Dest: "/c/d/f", Source: bindMount(lower), Selector: "etc/passwd"}}
		if r := attack(t, e, p); strings.Contains(r.stdout, "machine") {
			t.Errorf("the step says %q", r.stdout)
		}
	}
	stop(ended)
	attacker.Wait()
	checkUntouched(t, dir)
	if steps == 0 {
		t.Error("no step was attacked")
	}
}
