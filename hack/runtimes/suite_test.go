//go:build e2e

package runtimes

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/executor/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

const ours = "kilnrun"

var peers = []string{"runc", "crun"}

// spec is a case: a spec to run with each runtime.
type spec struct {
	name   string
	change func(s *specs.Spec, b *bundle)
	// facts are further arguments of the probe.
	facts []string
	// exec runs the probe as a further process of a container, after change has
	// been done to the process.
	exec func(p *specs.Process)
	// differs are lines that aren't the same, by the peer's name.
	differs map[string][]difference
	// lacks are peers that can't run it, in the versions that Debian has.
	lacks map[string]string
	wants []string // lines that must be there, of what nothing can be compared with
	code  int      // exit code; 0 for all but those that are about it
	fails bool     // with whatever code
	tells string   // what standard error has then
	flags []string
	files bool // the runtime gets a further file
}

// difference is a line that only one of two has.
type difference struct {
	line   string // regular expression
	reason string
}

// bundle is a directory with a root file system of its own for one run.
type bundle struct {
	*testing.T
	dir    string
	shared string // directory for the sources of mounts, the same for all runtimes
	id     string
	files  []*os.File // from 3 on
}

func (b *bundle) root(name string) string { return filepath.Join(b.dir, "rootfs", name) }

// rootFiles are in each root file system.
var rootFiles = map[string]string{
	"etc/passwd": "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/home/user:/bin/sh\n",
	"etc/group":  "root:x:0:\nuser:x:1000:\n",
	"full/a":     "a\n", "full/sub/b": "b\n",
}

func newBundle(t *testing.T, shared, id string) *bundle {
	t.Helper()
	b := &bundle{T: t, dir: t.TempDir(), shared: shared, id: id}
	// For containers whose root isn't this one's.
	for dir := b.dir; strings.HasPrefix(dir, os.TempDir()) && dir != os.TempDir(); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range rootFiles {
		if err := errors.Join(os.MkdirAll(filepath.Dir(b.root(name)), 0o755), os.WriteFile(b.root(name), []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{"bin", "tmp"} {
		if err := os.MkdirAll(b.root(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(env.probe, b.root("bin/probe")); err != nil {
		t.Fatal(err)
	}
	return b
}

// start is what each case changes.
func start(c spec) *specs.Spec {
	s := container.Example()
	s.Version = "1.0.2"
	s.Process.Terminal, s.Root.Readonly = false, false
	s.Process.Args = append([]string{"/bin/probe"}, c.facts...)
	s.Process.Env = []string{"PATH=/bin"}
	s.Hostname = "box"
	return s
}

func (b *bundle) write(name string, v any) {
	b.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(b.dir, name), text, 0o644); err != nil {
		b.Fatal(err)
	}
}

// result is how a run ended.
type result struct {
	code           int
	stdout, stderr string
}

// limit is how long one command may take; it takes a tenth of a second.
const limit = 60 * time.Second

func (b *bundle) invoke(binary string, args ...string) result {
	b.Helper()
	var out, errs bytes.Buffer
	cmd := command(binary, append([]string{"--root", filepath.Join(b.dir, "state")}, args...)...)
	cmd.Dir, cmd.ExtraFiles = b.dir, b.files
	// Not /dev/null: crun gives the machine's to the container's user.
	cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.WaitDelay = strings.NewReader(""), &out, &errs, limit
	timer := time.AfterFunc(limit, func() { cmd.Process.Kill() }) //nolint:errcheck // told by how it ends
	defer timer.Stop()
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		b.Fatalf("%s %s: %v", binary, strings.Join(args, " "), err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

// run runs c with one runtime.
func (c spec) run(t *testing.T, name, shared string) result {
	t.Helper()
	// All have the same length, as some runtimes cut it.
	b := newBundle(t, shared, fmt.Sprintf("kilntest-%d", os.Getpid()))
	if c.files {
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		b.files = []*os.File{f}
	}
	s := start(c)
	if c.exec != nil {
		return c.runExec(b, name, s)
	}
	if c.change != nil {
		c.change(s, b)
	}
	b.write("config.json", s)
	r := b.invoke(env.runtimes[name], slices.Concat([]string{"run", "--bundle", b.dir}, c.flags, []string{b.id})...)
	return result{r.code, b.normal(r.stdout), r.stderr}
}

// runExec runs the probe beside a process that waits.
func (c spec) runExec(b *bundle, name string, s *specs.Spec) result {
	b.Helper()
	process := *s.Process
	s.Process = &process
	if c.change != nil {
		c.change(s, b)
	}
	s.Process.Args = []string{"/bin/probe", "wait:/never"}
	if err := makeFifo(b.root("never")); err != nil {
		b.Fatal(err)
	}
	b.write("config.json", s)
	binary := env.runtimes[name]
	if r := b.invokeDetached(binary, "run", "--detach", "--bundle", b.dir, b.id); r.code != 0 {
		return r
	}
	defer func() {
		if r := b.invoke(binary, "delete", "--force", b.id); r.code != 0 {
			b.Errorf("delete: %+v", r)
		}
	}()
	p := *s.Process
	p.Args = append([]string{"/bin/probe"}, c.facts...)
	c.exec(&p)
	b.write("process.json", &p)
	r := b.invoke(binary, "exec", "--process", filepath.Join(b.dir, "process.json"), b.id)
	return result{r.code, b.normal(r.stdout), r.stderr}
}

// command runs a runtime. Crun refuses machines that have cgroups of both
// versions, each with controllers; it is shown one without the second.
func command(binary string, args ...string) *exec.Cmd {
	const second = "/sys/fs/cgroup/unified"
	if filepath.Base(binary) != "crun" || !isDir(second) {
		return exec.Command(binary, args...)
	}
	cmd := exec.Command("/bin/sh", append([]string{"-c", `umount -l "$0" && exec "$@"`, second, binary}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	return cmd
}

func isDir(name string) bool {
	info, err := os.Stat(name)
	return err == nil && info.IsDir()
}

// invokeDetached is invoke for commands that leave a process.
func (b *bundle) invokeDetached(binary string, args ...string) result {
	b.Helper()
	out, err := os.OpenFile(filepath.Join(b.dir, "out"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		b.Fatal(err)
	}
	defer out.Close()
	cmd := command(binary, append([]string{"--root", filepath.Join(b.dir, "state")}, args...)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = out, out, out
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		b.Fatalf("%s: %v", binary, err)
	}
	text, err := os.ReadFile(out.Name())
	if err != nil {
		b.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), "", string(text)}
}

// everywhere are differences in all cases, by the peer's name.
var everywhere = map[string][]difference{
	"runc": {
		{`^mount: / on /sys/fs/cgroup (ro|rw),.* tmpfs`, "the spec says read-only"},
	},
	"crun": {
		{`^mount: / on /sys/fs/cgroup (ro|rw),.* tmpfs`, "the spec says read-only"},
		{`^dev: /dev/core = `, "crun makes the link even if the kernel has no /proc/kcore"},
		{`^control: devices/devices.list = c 5:1 rwm`, "crun allows /dev/console, of which a container only sees a terminal"},
		{`^control: devices/devices.list = c 10:200 rwm`, "runc allows net/tun"},
		{`^keyring: session = keyring;0;0;3f1(3|b)0000`, "with runc, who owns the keyring may join it by its name, as exec does"},
		{`^cgroup: :/`, "it isn't shown the second hierarchy here, see command"},
		{`^control: memory/memory.swappiness = `, "crun's groups are below the machine's own, those of others below the caller's, and each begins with what it is there"},
		{`^env: HOME=`, "runc sets it if it has no value, also for users without a name"},
	},
}

var (
	namespaceLine = regexp.MustCompile(`(?m)^(namespace: \S+ = ).*$`)
	numbers       = regexp.MustCompile(`(?m)^(keyring: session = keyring;\d+;\d+;[0-9a-f]+;).*$`)
)

// meaningless is what becomes the same in all outputs.
var meaningless = []struct {
	re *regexp.Regexp
	to string
}{
	// The name of a mount that has no device.
	{regexp.MustCompile(`(?m)^(mount: .* - (?:tmpfs|cgroup|proc|sysfs|mqueue|devpts)) \S+`), "$1"},
	// The file system of a mount that is read-only may be read-only, too; an
	// empty one has any size; and a null device is from anywhere.
	{regexp.MustCompile(`(?m)^(mount: \S+ on \S+ ro\S* .* - \S+) r[ow]`), "$1 r?"},
	{regexp.MustCompile(`(?m)^(mount: .* - tmpfs r\?),size=0k`), "$1"},
	{regexp.MustCompile(`(?m)^mount: /null on (\S+) .*`), "mount: /null on $1"},
	// The root of a container or chroot may be a directory of its file system.
	{regexp.MustCompile(`(?m)^mount: \S+(SHARED|BUNDLE)`), "mount: $1"},
}

// normal leaves out what is different in each run.
func (b *bundle) normal(out string) string {
	out = strings.ReplaceAll(out, b.dir, "BUNDLE")
	out = strings.ReplaceAll(out, b.shared, "SHARED")
	out = strings.ReplaceAll(out, b.id, "ID")
	out = numbers.ReplaceAllString(out, "${1}NAME")
	for _, m := range meaningless {
		out = m.re.ReplaceAllString(out, m.to)
	}
	return namespaceLine.ReplaceAllStringFunc(out, func(line string) string {
		before, id, _ := strings.Cut(line, " = ")
		kind := strings.TrimPrefix(before, "namespace: ")
		if own, err := os.Readlink("/proc/self/ns/" + kind); err == nil && own == id {
			return before + " = the machine's"
		}
		return before + " = another"
	})
}

// lines are those that only one text has, each as often as it is missing in
// the other.
func only(a, b string) (list []string) {
	count := map[string]int{}
	for line := range strings.Lines(b) {
		count[line]++
	}
	for line := range strings.Lines(a) {
		if count[line]--; count[line] < 0 {
			list = append(list, strings.TrimSuffix(line, "\n"))
		}
	}
	return list
}

func TestSameAsOthers(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range cases {
		if seen[c.name] {
			t.Fatalf("two cases are called %s", c.name)
		}
		seen[c.name] = true
		t.Run(c.name, func(t *testing.T) {
			shared := newShared(t)
			got := c.run(t, ours, shared)
			if got.code != c.code && !c.fails || (got.code == 0) != (c.code == 0 && !c.fails) {
				t.Errorf("exit code %d, want %d: %s", got.code, c.code, got.stderr)
			}
			if !strings.Contains(got.stderr, c.tells) {
				t.Errorf("standard error %q, want %q in it", got.stderr, c.tells)
			}
			for _, line := range c.wants {
				if !strings.Contains(got.stdout, line+"\n") {
					t.Errorf("no line %q in\n%s", line, got.stdout)
				}
			}
			for _, peer := range peers {
				if c.lacks[peer] != "" {
					continue
				}
				want := c.run(t, peer, shared)
				if want.code != got.code && !(c.fails && want.code != 0) {
					t.Errorf("exit code %d, %s's is %d: %s", got.code, peer, want.code, want.stderr)
				}
				c.compare(t, peer, got.stdout, want.stdout)
			}
		})
	}
}

// compare fails for lines that differ and aren't listed, and for lists of what
// doesn't.
func (c spec) compare(t *testing.T, peer, got, want string) {
	t.Helper()
	listed := slices.Concat(everywhere[peer], c.differs[peer])
	used := map[int]bool{}
	known := func(line string) (yes bool) {
		for i, d := range listed {
			if regexp.MustCompile(d.line).MatchString(line) {
				used[i], yes = true, true
			}
		}
		return yes
	}
	for who, list := range map[string][]string{ours: only(got, want), peer: only(want, got)} {
		for _, line := range list {
			if !known(line) {
				t.Errorf("only with %s (not %s): %s", who, map[bool]string{true: peer, false: ours}[who == ours], line)
			}
		}
	}
	for i, d := range c.differs[peer] {
		if !used[len(everywhere[peer])+i] {
			t.Errorf("%s doesn't differ in %q, as listed (%s)", peer, d.line, d.reason)
		}
	}
}

// What is listed has its reason, and there are as many cases as there are
// said to be.
func TestLists(t *testing.T) {
	all := slices.Concat(slices.Collect(maps.Values(everywhere))...)
	for _, c := range cases {
		for _, list := range c.differs {
			all = append(all, list...)
		}
		for peer, why := range c.lacks {
			if why == "" {
				t.Errorf("%s: no reason why %s can't run it", c.name, peer)
			}
		}
		if len(c.lacks) == len(peers) && len(c.wants) == 0 {
			t.Errorf("%s: nothing to compare with, and nothing looked at", c.name)
		}
	}
	for _, d := range all {
		if d.reason == "" {
			t.Errorf("%q has no reason", d.line)
		}
	}
	if len(cases) < 60 {
		t.Errorf("%d cases", len(cases))
	}
}
