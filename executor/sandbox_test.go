//go:build linux && (amd64 || arm64)

package executor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/executor/sandboxtest"
	"golang.org/x/sys/unix"
)

// The whole sandbox, item by item, by trying to get out: as the first process of
// a container, and as one that a client starts in a running one.
func TestSandbox(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("of the machine"), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KILN_DAEMON_TOKEN", "x")
	lower := busyboxRoot(t)
	each(t, ours(t), func(t *testing.T, e *executor) {
		for _, c := range sandboxtest.Cases {
			t.Run(c.Item, func(t *testing.T) { tryAttack(t, e, c, lower, secret) })
		}
	})
}

func tryAttack(t *testing.T, e *executor, c sandboxtest.Case, lower, secret string) {
	step := func(script string, mode SecurityMode) Process {
		p := Process{ID: newID(), Args: []string{"sh", "-c", script + "; true"}, Env: []string{"PATH=/bin", "SECRET=" + secret, "DAEMON=executor.test"}, Security: mode}
		p.Root, _ = overlay(t, lower)
		if c.NoNetwork {
			p.Network = NetNone
		}
		return p
	}
	got := func(how string, r result) int {
		t.Helper()
		if r.err != nil {
			t.Errorf("%s: %v: %s%s", how, r.err, r.stdout, r.stderr)
		}
		if testing.Verbose() {
			t.Logf("%s: %s%s", how, r.stdout, r.stderr)
		}
		return strings.Count(r.stdout, "got")
	}
	if n := got("a step", attack(t, e, step(c.Attack, SecuritySandbox))); n != 0 {
		t.Errorf("the step got at %d things", n)
	}
	if n := got("a further process", attackFurther(t, e, step("cat", SecuritySandbox), step(c.Attack, SecuritySandbox))); n != 0 {
		t.Errorf("the further process got at %d things", n)
	}
	if c.Escapes == 0 {
		return
	}
	if n := got("an insecure step", attack(t, e, step(c.Attack, SecurityInsecure))); n < c.Escapes {
		t.Errorf("the attack shows little: without the sandbox it gets at %d things, not %d", n, c.Escapes)
	}
}

// The attacks of TestSandbox that have no insecure step to show them able
// to succeed find what is there to be found.
func TestSandboxAttacksSee(t *testing.T) {
	e := newTest(t, Config{})
	dir := t.TempDir()
	for name, script := range map[string]string{
		"environment": "cat /proc/[0-9]*/environ | grep -q KILN_DAEMON && env | grep -q KILN_DAEMON && echo got",
		"files":       "cat /m/secret && echo got",
		"descriptors": "exec 5</etc/passwd; for f in /proc/1/fd/*; do case $(readlink $f) in /dev/null|pipe:*) ;; *) echo got;; esac; done",
		"processes":   "sleep 100 & for p in /proc/[0-9]*; do grep -q sleep $p/cmdline && echo got; done",
	} {
		p := process(t, script)
		p.Env = append(p.Env, "KILN_DAEMON_TOKEN=x")
		p.Mounts = []Mount{{Dest: "/m", Source: bindMount(dir)}}
		if err := os.WriteFile(filepath.Join(dir, "secret"), []byte("x"), 0o644); err != nil {
			t.Fatal(err)
		}
		if r := attack(t, e, p); r.err != nil || !strings.Contains(r.stdout, "got") {
			t.Errorf("%s: %v, %q", name, r.err, r.stdout)
		}
	}
}

// What somebody put where a file is to be mounted isn't opened: it could
// block.
func TestMountPointIsNotOpened(t *testing.T) {
	src := t.TempDir()
	if err := os.WriteFile(filepath.Join(src, "f"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	eachRuntime(t, func(t *testing.T, e *executor) {
		cache := t.TempDir()
		if err := errors.Join(unix.Mkfifo(filepath.Join(cache, "fifo"), 0o644), unix.Mknod(filepath.Join(cache, "disk"), unix.S_IFBLK|0o644, int(unix.Mkdev(7, 0)))); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"fifo", "disk"} {
			p := process(t, "cat /c/"+name)
			p.Mounts = []Mount{{Dest: "/c", Source: bindMount(cache)}, {Dest: "/c/" + name, Source: bindMount(src), Selector: "f"}}
			if r := attack(t, e, p); r.err != nil || r.stdout != "x" {
				t.Errorf("%s: %v, %q %s", name, r.err, r.stdout, r.stderr)
			}
		}
	})
}

// What would be a mount point below /proc is refused, but for the files that
// show a container its own limits.
func TestMountsInProc(t *testing.T) {
	src := t.TempDir()
	if err := os.WriteFile(filepath.Join(src, "f"), []byte("faked\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	each(t, ours(t), func(t *testing.T, e *executor) { mountsInProc(t, e, src) })
}

func mountsInProc(t *testing.T, e *executor, src string) {
	for dest, allowed := range map[string]bool{
		"/proc": false, "/proc/": false, "/proc/self/attr": false, "/proc/sys/kernel": false, "/proc/1/fd": false, "/x/../proc/sys": false, "/proc/keys": false,
		"/proc/cpuinfo": true, "/proc/meminfo": true,
	} {
		p := process(t, fmt.Sprintf("cat %s", dest))
		p.Mounts = []Mount{{Dest: dest, Source: bindMount(src)}}
		if allowed {
			p.Mounts[0].Selector = "f"
		}
		r := attack(t, e, p)
		if allowed != (r.err == nil) || !allowed && !strings.Contains(r.err.Error(), "below /proc") || allowed && r.stdout != "faked\n" {
			t.Errorf("%s: %v, %q", dest, r.err, r.stdout)
		}
	}
}
