//go:build e2e

package e2e

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/hack/harness"
	"golang.org/x/sys/unix"
)

// asUser has the daemons of a test run as an ordinary user who has count ids
// besides its own.
func asUser(t *testing.T, count int) *harness.Unprivileged {
	t.Helper()
	before, program := env.user, env.kilnd
	dir, err := os.MkdirTemp("", "kiln-user-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		env.user, env.kilnd = before, program
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if env.user, env.kilnd, err = unprivileged(dir, count); err != nil {
		t.Fatal(err)
	}
	return env.user
}

// compat: DMN-013
func TestRootless(t *testing.T) {
	asUser(t, 65536)
	d := newDaemon(t, "--allow-insecure-entitlement", "security.insecure")
	t.Run("SaysWhatItCant", func(t *testing.T) {
		cant := []string{"device nodes", "other ids than 0 to 65536", "no cgroup is delegated", "the networks bridge and cni", "--oci-worker-binary"}
		d.logs(cant...)
		for _, want := range cant {
			if n := strings.Count(d.log.String(), want); n != 1 {
				t.Errorf("the log says %d times %q:\n%s", n, want, d.log)
			}
		}
	})
	t.Run("Step", func(t *testing.T) {
		out := d.local(`FROM BASE AS b
RUN cat /proc/self/uid_map > /map && echo x > /dev/null && [ "$(head -c2 /dev/zero | wc -c)" = 2 ] && grep -q ' /sys sysfs ro,' /proc/mounts && [ -d /sys/class ]
RUN mkdir /d && touch /d/a /d/b && chown 33:65536 /d/a
RUN rm -r /d && mkdir /d && touch /d/c && [ "$(ls /d)" = c ]
RUN if mknod /n c 1 3; then exit 1; fi
RUN --network=none [ "$(ls /sys/class/net)" = lo ]
FROM scratch
COPY --from=b /map /d /
`, nil)
		if got := strings.Fields(readFile(t, out, "map")); len(got) != 6 || got[0] != "0" || got[1] == "0" || got[5] != "65536" {
			t.Errorf("the step's ids are %v", got)
		}
		readFile(t, out, "c")
	})
	t.Run("Insecure", func(t *testing.T) {
		d.dockerfile("FROM BASE\nRUN --security=insecure mount -t tmpfs x /tmp && ls -l /dev && chroot / true\n", nil, "--allow", "security.insecure").must(t)
	})
	t.Run("Limits", func(t *testing.T) {
		r := d.dockerfile("FROM BASE\nRUN [ $(ulimit -Hn) -lt 2147483647 ]\n", nil, "--opt", "memory=67108864", "--opt", "ulimit=nofile=1024:2147483647").must(t)
		for _, want := range []string{"limits of memory, CPUs and processes have no effect", "can't raise limits above its own: nofile is "} {
			if !strings.Contains(r.stderr, want) {
				t.Errorf("stderr lacks %q:\n%s", want, r.stderr)
			}
		}
	})
	t.Run("IDs", func(t *testing.T) {
		const outside = "is outside the ids that this rootless daemon has, 0 to 65536"
		d.dockerfile("FROM BASE\nCOPY --chown=70000:5 f /\n", files{"f": "x"}).fails(t, "user 70000 "+outside, "/etc/subuid")
		d.dockerfile("FROM BASE\nUSER 5:70000\nRUN true\n", nil).fails(t, "group 70000 "+outside, "/etc/subgid")
	})
	t.Run("Devices", func(t *testing.T) {
		out := d.local("FROM BASE AS b\nADD a.tar /t/\nRUN ls /t > /l\nFROM scratch\nCOPY --from=b /l /\n", files{"a.tar": archiveWithDevice(t)})
		if got := readFile(t, out, "l"); got != "after\nbefore\n" {
			t.Errorf("of an archive with a device came %q", got)
		}
	})
	t.Run("RootOfTheMachine", func(t *testing.T) {
		r := runCommand(t, exec.Command(filepath.Join(env.bin, "kilnd"), "--root", d.root, "--addr", "unix://"+d.dir+"/other", "--config", d.config))
		r.fails(t, d.root, "is that of a rootless daemon")
	})
}

// Paths are relative to where the user is; where it may not be, a daemon still
// starts.
func TestRootlessWorkingDirectory(t *testing.T) {
	u := asUser(t, 65536)
	state := filepath.Join(u.Home, "state")
	if err := errors.Join(os.Mkdir(state, 0o755), os.WriteFile(filepath.Join(state, "rootless-ids"), []byte("uid 0 7 1\n"), 0o644)); err != nil {
		t.Fatal(err)
	}
	private := t.TempDir()
	if err := os.Chmod(private, 0o700); err != nil {
		t.Fatal(err)
	}
	for dir, root := range map[string]string{u.Home: "state", private: state} {
		cmd := kilndCommand("fsck", "--root", root)
		cmd.Dir = dir
		runCommand(t, cmd).fails(t, root+" was made with other ids", "uid 0 7 1\n")
	}
}

// archiveWithDevice is a tar with a device between two files.
func archiveWithDevice(t *testing.T) string {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range []*tar.Header{
		{Name: "before", Typeflag: tar.TypeReg, Mode: 0o644}, {Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Mode: 0o666},
		{Name: "after", Typeflag: tar.TypeReg, Mode: 0o644},
	} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.String()
}

// What is missing is named, with the fix.
func TestRootlessRefuses(t *testing.T) {
	u := asUser(t, 65536)
	start := func(args ...string) *exec.Cmd {
		return kilndCommand(append([]string{"--root", filepath.Join(u.Home, "state"), "--addr", "unix://" + filepath.Join(u.Home, "s")}, args...)...)
	}
	runCommand(t, start("--oci-worker-net", "bridge")).fails(t, "network mode bridge", "rootless", "rootlesskit")
	runCommand(t, start("--oci-worker-binary", "runc")).fails(t, "runtime runc", "built-in")
	inPath := start()
	inPath.Env = append(inPath.Env, "PATH="+pathWithout(t, "newuidmap"))
	runCommand(t, inPath).fails(t, "newuidmap", "install Debian's package uidmap")
	// Root of a namespace that somebody else has made badly.
	bare := u.Command("unshare", "--user", "--map-root-user", env.kilnd, "--root", filepath.Join(u.Home, "bare"), "--addr", "unix://"+filepath.Join(u.Home, "s"))
	runCommand(t, bare).fails(t, "no mounts of its own", "start kilnd as the ordinary user")
	homeless := kilndCommand("--root", filepath.Join(u.Home, "state"))
	homeless.Env = append(homeless.Env, "XDG_RUNTIME_DIR=")
	runCommand(t, homeless).fails(t, "listen on unix:///run/buildkit/buildkitd.sock", "permission denied", "XDG_RUNTIME_DIR", "--addr")
	asUser(t, 0)
	runCommand(t, start()).fails(t, "/etc/subuid has no range of ids for user kiln-test", "usermod --add-subuids")
}

// pathWithout is a directory with what the test's user needs, but for a program.
func pathWithout(t *testing.T, missing string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"sh", "mount", "setpriv", "unshare", "newuidmap", "newgidmap", "nsenter"} {
		path, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		if name == missing {
			continue
		}
		if err := os.Symlink(path, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// A daemon that is root of a namespace with mounts of its own, as under
// rootlesskit, uses that one, and its network if it belongs to it.
func TestRootlessInANamespace(t *testing.T) {
	asUser(t, 65536)
	t.Cleanup(func() { env.inside = nil })
	env.inside = []string{"unshare", "--user", "--mount", "--map-root-user", "--map-auto"}
	const dockerfile = "FROM base\nRUN id -u && touch /f && chown 5:5 /f && ls /sys/class/net && ip addr >&2\n"
	base := []string{"--oci-layout", "store=" + env.layout.Dir, "--opt", fmt.Sprintf("context:base=oci-layout://store@%s", env.layout.Manifest.Digest)}
	d := newDaemon(t)
	d.dockerfile(dockerfile, nil, base...).must(t)
	d.logs("the networks bridge and cni")
	env.inside = append(env.inside, "--net")
	d = newDaemon(t, "--oci-worker-net", "bridge")
	if r := d.dockerfile(dockerfile, nil, base...).must(t); !strings.Contains(r.stderr, "inet 10.10.") {
		t.Errorf("the step isn't in the bridge's network:\n%s", r.stderr)
	}
	if strings.Contains(d.log.String(), "the networks bridge and cni") {
		t.Errorf("the log says that there are no networks:\n%s", d.log)
	}
}

// Below rootlesskit, which ends with the daemon: a step that the daemon leaves goes
// on in namespaces that are no longer the next one's.
func TestRootlessBelowRootlesskit(t *testing.T) {
	belowRootlesskit(t)
	d := newDaemon(t)
	d.dockerfile(`FROM BASE
RUN [ "$(id -u)" = 0 ] && touch /f && chown 5:65536 /f && [ "$(stat -c %u:%g /f)" = 5:65536 ]
COPY --chown=33:44 f /g
RUN [ "$(stat -c %u:%g /g)" = 33:44 ]
RUN --mount=type=cache,target=/c touch /c/f
USER 1000
RUN [ "$(id -u)" = 1000 ]
`, files{"f": "x"}).must(t)
	first := d.buildLong()
	first.begun()
	d.kill()
	first.fails()
	d.start()
	second := d.buildLong()
	second.begun()
	d.goOn()
	second.succeeds(1)
}

// With a network of rootlesskit's, steps have the bridge, and by it the machine.
func TestRootlessBelowRootlesskitOnABridge(t *testing.T) {
	// The machine's node may be root's alone.
	tun := filepath.Join(t.TempDir(), "tun")
	if err := errors.Join(unix.Mknod(tun, unix.S_IFCHR, int(unix.Mkdev(10, 200))), os.Chmod(tun, 0o666)); err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(env.registry)
	if err != nil {
		t.Fatal(err)
	}
	belowRootlesskit(t, "--net=slirp4netns", "--copy-up=/etc", "--copy-up=/run")
	env.outside = []string{"unshare", "--mount", "sh", "-c", "mount --bind " + tun + ` /dev/net/tun && exec "$0" "$@"`}
	base := []string{"--oci-layout", "store=" + env.layout.Dir, "--opt", fmt.Sprintf("context:base=oci-layout://store@%s", env.layout.Manifest.Digest)}
	d := newDaemon(t, "--oci-worker-net", "bridge")
	r := d.dockerfile("FROM base\nRUN ip addr >&2 && wget -S -O /dev/null http://10.0.2.2:"+port+"/v2/\n", nil, base...).must(t)
	for _, want := range []string{"inet 10.10.", "200 OK"} {
		if !strings.Contains(r.stderr, want) {
			t.Errorf("stderr lacks %q:\n%s", want, r.stderr)
		}
	}
}

// belowRootlesskit has the daemons of a test run below it, as an ordinary user.
func belowRootlesskit(t *testing.T, args ...string) {
	t.Helper()
	u := asUser(t, 65536)
	t.Cleanup(func() { env.inside, env.outside = nil, nil })
	// One that is killed leaves its files.
	env.inside = append([]string{"rootlesskit", "--state-dir", filepath.Join(u.Home, "rootlesskit")}, args...)
}

// Where a part of the machine's /proc is hidden, as in a container, none can be
// mounted.
func TestRootlessWithHiddenProc(t *testing.T) {
	asUser(t, 65536)
	env.outside = []string{"unshare", "--mount", "sh", "-c", `mount -t tmpfs none /proc/irq && exec "$0" "$@"`}
	t.Cleanup(func() { env.outside = nil })
	newDaemon(t).dockerfile("FROM BASE\nRUN true\n", nil).fails(t, "mount /proc: operation not permitted", "a part of the machine's /proc is hidden", "systempaths=unconfined", "--oci-worker-no-process-sandbox")
	t.Run("NoProcessSandbox", noProcessSandbox)
}

// Steps are among the daemon's processes then; what they leave ends with them
// all the same.
//
// compat: DMN-079
func noProcessSandbox(t *testing.T) {
	d := newDaemon(t, "--oci-worker-no-process-sandbox")
	d.logs("can end and look into")
	if r := d.buildctl("debug", "workers", "--verbose").must(t); !strings.Contains(r.stdout, "no-sandbox") {
		t.Errorf("the worker's labels don't say so:\n%s", r.stdout)
	}
	const left = `trap '' TERM HUP; (sleep 1000; true) & (sleep 1000; true) & setsid sh -c "trap '' TERM HUP; sleep 1000" &`
	d.dockerfile(fmt.Sprintf(`FROM BASE
RUN [ $$ != 1 ] && grep -q sh /proc/$$/comm && [ -z "$(ls /proc/irq)" ] && ! touch /proc/sys/x
RUN %s true
RUN %s exit 3
`, left, left), nil).fails(t, "exit code: 3")
	if r := d.dockerfile("FROM BASE\nRUN kill -0 "+fmt.Sprint(d.cmd.Process.Pid)+"\n", nil); r.code != 0 {
		t.Errorf("the daemon isn't seen: %s", r.stderr)
	}
}

// A daemon that was given a version 2 cgroup of its own has its steps in groups
// below it.
func TestRootlessWithACgroup(t *testing.T) {
	u := asUser(t, 65536)
	mount, err := os.MkdirTemp("", "kiln-cgroup-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(mount) })
	if err := unix.Mount("none", mount, "cgroup2", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(mount, unix.MNT_DETACH) })
	name := fmt.Sprintf("kiln-e2e-delegated-%d", os.Getpid())
	group := filepath.Join(mount, name)
	if err := os.Mkdir(group, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // after the daemon's end; what is left in a group keeps it
		// A process that has ended leaves its group a moment later.
		if err := harness.WaitFor(harness.Patience, func() error {
			if err := os.Remove(filepath.Join(group, "init")); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
			return os.Remove(group)
		}); err != nil {
			t.Error(err)
		}
	})
	if err := u.Own(group, filepath.Join(group, "cgroup.procs"), filepath.Join(group, "cgroup.subtree_control"), filepath.Join(group, "cgroup.threads")); err != nil {
		t.Fatal(err)
	}
	// Once a daemon has passed controllers on, processes can't be in the group itself.
	env.outside = []string{"unshare", "--mount", "sh", "-c", `umount -l -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && cd /sys/fs/cgroup/` + name + ` &&
		{ { echo $$ > cgroup.procs; } 2>/dev/null || echo $$ > init/cgroup.procs; } && cd "$OLDPWD" && exec "$0" "$@"`}
	t.Cleanup(func() { env.outside = nil })
	d := newDaemon(t)
	if strings.Contains(d.log.String(), "no cgroup is delegated") {
		t.Errorf("the log says that there is no cgroup:\n%s", d.log)
	}
	for range 2 {
		d.dockerfile("FROM BASE\nRUN [ \"$(cat /proc/self/cgroup | tail -n1)\" = 0::/ ] && [ \"$(cat /sys/fs/cgroup/cgroup.procs | head -n1)\" = 1 ]\n", nil, "--no-cache").must(t)
		if _, err := os.Stat(filepath.Join(group, "init")); err != nil {
			t.Errorf("the daemon hasn't moved: %v", err)
		}
		d.kill() // and again, beside a supervisor that may still be there
		d.start()
	}
	env.outside = nil // nothing more is to be in the group
}

// buildctl build PATH of an ordinary user just works.
func TestRootlessAutostart(t *testing.T) {
	u := asUser(t, 65536)
	if err := u.Own(filepath.Dir(env.kilnd)); err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(filepath.Join(env.bin, "buildctl"))
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(filepath.Dir(env.kilnd), "buildctl") // beside kilnd
	if err := os.WriteFile(bin, program, 0o755); err != nil {
		t.Fatal(err)
	}
	before := survey(t, u.Home)
	dir := files{"Dockerfile": strings.ReplaceAll("FROM BASE AS b\nRUN id -u > /id\nFROM scratch\nCOPY --from=b /id /\n", "BASE", env.base)}.write(t)
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	out := filepath.Join(u.Home, "out")
	r := runCommand(t, u.Command(bin, "--debug", "--timeout", "300", "build", "-o", out, dir)).must(t)
	if !strings.Contains(r.stderr, "private, just started") {
		t.Errorf("--debug doesn't say which daemon is used: %s", r.stderr)
	}
	if got := readFile(t, out, "id"); got != "0\n" {
		t.Errorf("the step ran as %q", got)
	}
	stopByRoot(t, filepath.Join(u.Home, ".local", "share", "kiln"))
	runCommand(t, asUser(t, 0).Command(bin, "build", dir)).fails(t, "a private one can't be started", "/etc/subuid has no range of ids")
	if left := survey(t, u.Home).since(before); left != "" {
		t.Errorf("left behind:\n%s", left)
	}
}
