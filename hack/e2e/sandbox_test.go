//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A step whose program is the daemon's own file gets one that can't be
// changed: what runc's overwrite of 2019 did.
func TestDaemonsProgramIsOutOfReach(t *testing.T) {
	d := newDaemon(t)
	exe := fmt.Sprintf("/proc/%d/exe", d.cmd.Process.Pid)
	if err := os.Chmod(exe, 0o755); !errors.Is(err, unix.EROFS) {
		t.Errorf("change the file that the daemon executes: %v, want %v", err, unix.EROFS)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(exe, &st); err != nil || st.Flags&unix.ST_RDONLY == 0 {
		t.Errorf("the file that the daemon executes is on a mount with flags %#x (%v)", st.Flags, err)
	}
	// The control: this program isn't protected.
	if err := unix.Statfs("/proc/self/exe", &st); err != nil || st.Flags&unix.ST_RDONLY != 0 {
		t.Errorf("this test can't tell: flags %#x (%v)", st.Flags, err)
	}
	if got := readFile(t, fmt.Sprintf("/proc/%d/comm", d.cmd.Process.Pid)); got != "kilnd\n" {
		t.Errorf("the daemon is called %q", got)
	}
	before := readFile(t, env.bin, "kilnd")
	for _, run := range []string{
		`RUN ["/proc/self/exe", "--version"]`,
		`RUN ["/e", "--version"]`,
		`RUN printf '#!/proc/self/exe --version\n' > /s && chmod +x /s` + "\n" + `RUN ["/s"]`,
	} {
		// Whether it runs, as the step's user and in its sandbox, is of no weight.
		d.dockerfile("FROM BASE\nRUN ln -s /proc/self/exe /e\n"+run+"\n", nil)
	}
	if readFile(t, env.bin, "kilnd") != before {
		t.Error("the daemon's program has changed")
	}
}

// What lifts the sandbox needs the daemon's word and the client's.
// compat: CTL-023, DMN-008, DF-081
func TestEntitlementsTakeBoth(t *testing.T) {
	steps := map[string]string{
		"security.insecure": "FROM BASE\nRUN --security=insecure mount -t tmpfs none /tmp\n",
		"network.host":      "FROM BASE\nRUN --network=host test -d /sys/class/net/lo\n",
	}
	names := []string{"security.insecure", "network.host"}
	for _, byDaemon := range [][]string{nil, {names[0]}, {names[1]}, names} {
		var flags []string
		for _, e := range byDaemon {
			flags = append(flags, "--allow-insecure-entitlement", e)
		}
		d := newDaemon(t, flags...)
		for _, byClient := range [][]string{nil, {names[0]}, {names[1]}, names} {
			var allow []string
			refused := false // the request as a whole, if it asks for what the daemon doesn't give
			for _, e := range byClient {
				allow = append(allow, "--allow", e)
				refused = refused || !slices.Contains(byDaemon, e)
			}
			for need, text := range steps {
				r := d.dockerfile(text, nil, allow...)
				granted := !refused && slices.Contains(byClient, need)
				if ok := r.code == 0; ok != granted {
					t.Errorf("the daemon allows %v, the client %v: a step that needs %s ran: %v\n%s", byDaemon, byClient, need, ok, r.stderr)
				}
				if !granted && !strings.Contains(r.stderr, "not allowed") {
					t.Errorf("the daemon allows %v, the client %v, %s is refused with:\n%s", byDaemon, byClient, need, r.stderr)
				}
			}
			if r := d.dockerfile("FROM BASE\nRUN ! mount -t tmpfs none /tmp 2>/dev/null\n", nil, allow...); (r.code != 0) != refused {
				t.Errorf("the daemon allows %v, the client %v: a step that needs nothing: %s", byDaemon, byClient, r.stderr)
			}
		}
		for _, bad := range []string{"security.insecur", "device=", "network.host=x", "all", ""} {
			d.dockerfile("FROM BASE\n", nil, "--allow", bad).fails(t, "unknown entitlement")
		}
		d.dockerfile("FROM BASE\n", nil, "--allow", "device").fails(t, "device", "not allowed")
	}
	// One build's word is not another's: the same step of a build that was granted
	// it is no hit for one that wasn't.
	d := newDaemon(t, "--allow-insecure-entitlement", names[0])
	d.dockerfile(steps[names[0]], nil, "--allow", names[0]).must(t)
	d.dockerfile(steps[names[0]], nil).fails(t, "security.insecure", "not allowed")
}

// Secrets are seen by the step that mounts them, and nowhere else: not in the
// state directory, the log, the history, the layers, or other processes.
// compat: LLB-047, LLB-030, SES-070
func TestSecretsLeaveNoTrace(t *testing.T) {
	const inFile, inEnv, unused = "kiln-s3cret-in-a-file", "kiln-s3cret-in-env", "kiln-s3cret-unused"
	values := []string{inFile, inEnv, unused}
	dir := t.TempDir()
	var args []string
	for i, v := range values {
		name := filepath.Join(dir, fmt.Sprint(i))
		if err := os.WriteFile(name, []byte(v), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--secret", fmt.Sprintf("id=s%d,src=%s", i, name))
	}
	d := newDaemon(t)
	out := filepath.Join(t.TempDir(), "image.tar")
	const good = `FROM BASE
RUN --mount=type=secret,id=s0 --mount=type=secret,id=s1,env=TOKEN test "$(wc -c < /run/secrets/s0)" = 21 && test ${#TOKEN} = 18
RUN --mount=type=secret,id=s0,target=/etc/token,mode=0444 --mount=type=secret,id=s1,env=TOKEN wc -c /etc/token | cut -c1-2; test -n "$TOKEN"
RUN ! grep -rq s3cret /etc /run /tmp /proc/1/environ /proc/self/mountinfo
`
	d.dockerfile(good, nil, append(slices.Clone(args), "--output", "type=oci,dest="+out)...).must(t)
	// One that fails, whose error goes to the client, the log and the history.
	failed := d.dockerfile("FROM BASE\nRUN --mount=type=secret,id=s0 --mount=type=secret,id=s1,env=TOKEN test -z \"$TOKEN\"\n", nil, args...)
	if failed.code == 0 {
		t.Error("the step that fails on purpose didn't")
	}
	// A value that can't be a variable, which is an error of the daemon's own.
	zero := filepath.Join(dir, "zero")
	if err := os.WriteFile(zero, []byte(inEnv+"\x00"), 0o600); err != nil {
		t.Fatal(err)
	}
	bad := d.dockerfile("FROM BASE\nRUN --mount=type=secret,id=z,env=TOKEN true\n", nil, "--secret", "id=z,src="+zero)
	bad.fails(t, "TOKEN", "zero byte")
	// While one step has them, another one and the machine's processes don't.
	watchers := d.whileStepRuns(args)
	d.stop()
	for what, text := range map[string]string{
		"the daemon's log": d.log.String(), "what the client printed": failed.stdout + failed.stderr + bad.stdout + bad.stderr, "a process": watchers,
	} {
		if strings.Contains(text, "s3cret") {
			t.Errorf("%s holds a secret:\n%s", what, text)
		}
	}
	for _, v := range values {
		assertNowhere(t, d.root, v)
		assertNowhere(t, d.dir, v)
	}
	assertNowhereInArchive(t, out, values)
	d.start()
}

// whileStepRuns returns the environments and arguments of all processes that
// aren't of the step that has the secrets, while it runs beside another.
func (d *daemon) whileStepRuns(args []string) string {
	d.t.Helper()
	const cache = "FROM BASE\nRUN --mount=type=cache,target=/c "
	d.dockerfile(cache+"mkfifo /c/ready /c/seen\n", nil).must(d.t)
	holder := cache + "--mount=type=secret,id=s0 --mount=type=secret,id=s1,env=TOKEN echo > /c/ready && timeout 60 cat /c/seen\n"
	// The word is taken apart, since the script is in an environment itself.
	watcher := cache + "timeout 60 cat /c/ready; word=s3cr; word=${word}et; cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline /proc/[0-9]*/mountinfo > /tmp/seen; " +
		"grep -ao $word.* /tmp/seen; find / -xdev -type f -size -2k | xargs grep -a $word; wc -c < /tmp/seen; echo > /c/seen\n"
	done := make(chan result, 1)
	go func() { done <- d.dockerfile(holder, nil, args...) }()
	seen := d.dockerfile(watcher, nil, "--progress", "plain")
	holding := <-done
	if holding.code != 0 || seen.code != 0 {
		d.t.Errorf("steps side by side: %s%s", holding.stderr, seen.stderr)
	}
	return seen.stdout + seen.stderr
}

// assertNowhereInArchive looks into the blobs of an image.
func assertNowhereInArchive(t *testing.T, archive string, values []string) {
	t.Helper()
	dir := t.TempDir()
	command(t, nil, "tar", "-xf", archive, "-C", dir)
	if err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		// Layers are gzip, the rest is JSON.
		out, err := exec.Command("gzip", "-dcf", path).Output()
		if err != nil {
			return err
		}
		for _, v := range values {
			if strings.Contains(string(out), v) {
				t.Errorf("%s of the image holds %q", e.Name(), v)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}
