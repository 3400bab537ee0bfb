//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/hack/harness"
)

// After one change each, explain names it, and nothing else; steps that it doesn't
// touch come from the cache.
func TestExplainNamesTheCause(t *testing.T) {
	d := newDaemon(t, "--allow-insecure-entitlement", "network.host", "--allow-insecure-entitlement", "security.insecure")
	r := startRemote(t)
	moved := env.registry + "/test/moved:latest"
	d.push(moved, "1").must(t)
	secret := func(text string) string {
		path := filepath.Join(t.TempDir(), "secret")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return "src=" + path
	}
	one, two := secret("1"), secret("2")
	const follows = "ran because it now follows "
	for _, c := range []struct {
		name          string
		before, after string   // Dockerfiles; without the second one it stays
		args, more    []string // of both builds, of the second one
		change        func()
		want          []string // what steps ran for; the beginning is enough
	}{
		{name: "argument of a later stage", before: "FROM BASE AS a\nRUN echo a\nFROM BASE\nARG V=1\nCOPY --from=a /bin/busybox /x\nRUN echo b$V\n",
			more: []string{"--build-arg", "V=2"}, want: []string{"ran because the build argument V changed"}},
		{name: "default of an argument", before: "FROM BASE\nARG V=1\nRUN echo c\n", after: "FROM BASE\nARG V=2\nRUN echo c\n",
			want: []string{"ran because the environment variable V changed"}},
		{name: "argument expanded", before: "FROM BASE\nARG V=1\nCOPY f /$V\n", more: []string{"--build-arg", "V=2"},
			want: []string{"ran because the destination changed from /1 to /2 (probably because the build argument V changed)"}},
		{name: "argument behind a step", before: "FROM BASE\nARG V=1\nRUN echo x$V\nCOPY f /f\n", args: []string{"--build-arg", "V=1"}, more: []string{"--build-arg", "V=2", "--build-arg", "UNUSED=1"},
			want: []string{"ran because the build argument V changed", "ran because [2/3] RUN echo x2 has a new result (the build argument V changed)"}},
		{name: "order of the environment", before: "FROM BASE\nENV A=1\nENV B=2\nRUN echo d\n", after: "FROM BASE\nENV B=2\nENV A=1\nRUN echo d\n",
			want: []string{"ran because the order of the environment changed"}},
		{name: "id of a secret", before: "FROM BASE\nRUN --mount=type=secret,id=s1,target=/s echo e\n", after: "FROM BASE\nRUN --mount=type=secret,id=s2,target=/s echo e\n",
			args: []string{"--secret", "id=s1," + one, "--secret", "id=s2," + one}, want: []string{"ran because the mount /s changed from secret id=s1 "}},
		{name: "content of a secret", before: "FROM BASE\nRUN --mount=type=secret,id=s1,target=/s cat /s; echo f\n", args: []string{"--secret", "id=s1," + one}, more: []string{"--secret", "id=s1," + two}},
		{name: "secret as variable", before: "FROM BASE\nRUN --mount=type=secret,id=s1,env=S echo g\n", after: "FROM BASE\nRUN --mount=type=secret,id=s1,env=S2 echo g\n",
			args: []string{"--secret", "id=s1," + one}, want: []string{"ran because the secret variable S was removed: s1 optional=true and the secret variable S2 was added"}},
		{name: "id of an agent", before: "FROM BASE\nRUN --mount=type=ssh,id=a echo h\n", after: "FROM BASE\nRUN --mount=type=ssh,id=b echo h\n",
			want: []string{"ran because the mount /run/buildkit/ssh_agent.0 changed from ssh id=a "}},
		{name: "network", before: "FROM BASE\nRUN echo i\n", after: "FROM BASE\nRUN --network=none echo i\n", want: []string{"ran because the network changed from unset to none"}},
		{name: "network of the machine", before: "FROM BASE\nRUN echo i2\n", after: "FROM BASE\nRUN --network=host echo i2\n", args: []string{"--allow", "network.host"},
			want: []string{"ran because the network changed from unset to host"}},
		{name: "security", before: "FROM BASE\nRUN echo i3\n", after: "FROM BASE\nRUN --security=insecure echo i3\n", args: []string{"--allow", "security.insecure"},
			want: []string{"ran because the security changed from sandbox to insecure"}},
		{name: "entitlements alone", before: "FROM BASE\nRUN echo i4\n", more: []string{"--allow", "security.insecure", "--allow", "network.host"}},
		{name: "id of a cache mount", before: "FROM BASE\nRUN --mount=type=cache,id=c1,target=/c echo j\n", after: "FROM BASE\nRUN --mount=type=cache,id=c2,target=/c echo j\n"},
		{name: "mounted stage", before: "FROM BASE AS a\nRUN echo 1 > /x\nFROM BASE\nRUN --mount=from=a,source=/x,target=/x echo k\n", after: "FROM BASE AS a\nRUN echo 2 > /x\nFROM BASE\nRUN --mount=from=a,source=/x,target=/x echo k\n",
			want: []string{"ran because its command changed; it was RUN echo 1 > /x", "ran because x changed (its command changed; it was RUN echo 1 > /x)"}},
		{name: "heredoc", before: "FROM BASE\nRUN <<E\necho l\nE\n", after: "FROM BASE\nRUN <<E\necho l2\nE\n", want: []string{"ran because its command changed; it was RUN <<E (echo l)"}},
		{name: "copied here-document", before: "FROM BASE\nCOPY <<E /etc/e\nl\nE\n", after: "FROM BASE\nCOPY <<E /etc/e\nl2\nE\n",
			want: []string{"ran because the here-document E in the Dockerfile changed", "ran because the here-document E in the Dockerfile changed"}},
		{name: "another here-document", before: "FROM BASE\nCOPY <<E /etc/e\nm\nE\n", after: "FROM BASE\nCOPY <<E /etc/e\nm\nE\nCOPY <<E /etc/e2\nm2\nE\n",
			want: []string{"ran, probably because the here-document E in the Dockerfile changed", "ran because no earlier run of it is known"}},
		{name: "user", before: "FROM BASE\nRUN echo m\n", after: "FROM BASE\nUSER daemon\nRUN echo m\n", want: []string{"ran because the user was added: daemon"}},
		{name: "shell", before: "FROM BASE\nRUN echo n\n", after: "FROM BASE\nSHELL [\"/bin/ash\",\"-c\"]\nRUN echo n\n", want: []string{"ran because its command changed"}},
		{name: "label", before: "FROM BASE\nLABEL a=1\nRUN echo o\n", after: "FROM BASE\nLABEL a=2\nRUN echo o\n"},
		{name: "proxy", before: "FROM BASE\nRUN echo p\n", more: []string{"--build-arg", "HTTP_PROXY=http://x"}},
		{name: "platform", before: "FROM --platform=$BUILDPLATFORM BASE\nARG TARGETARCH\nRUN echo q\n", more: []string{"--platform", "linux/arm64"},
			want: []string{"ran because the environment variable TARGETARCH changed"}},
		{name: "epoch", before: "FROM BASE\nWORKDIR /r\nRUN echo r\n", args: []string{"--build-arg", "SOURCE_DATE_EPOCH=1"}, more: []string{"--build-arg", "SOURCE_DATE_EPOCH=2"},
			want: []string{"ran because the timestamp changed from 1000000000 to 2000000000", "ran because [2/3] WORKDIR /r has a new result (the timestamp changed from "}},
		{name: "no cache of a stage", before: "FROM BASE AS a\nRUN echo s > /x\nFROM BASE\nCOPY --from=a /x /x\n", more: []string{"--opt", "no-cache=a"}, want: []string{"ran because --no-cache-filter=a asks for it"}},
		{name: "same text in two stages", before: "FROM BASE AS a\nENV A=1\nRUN echo t\nFROM BASE AS b\nENV B=1\nRUN echo t\nFROM scratch\nCOPY --from=a /bin/busybox /a\nCOPY --from=b /bin/busybox /b\n",
			after: "FROM BASE AS a\nENV A=1\nRUN echo t\nFROM BASE AS b\nENV B=2\nRUN echo t\nFROM scratch\nCOPY --from=a /bin/busybox /a\nCOPY --from=b /bin/busybox /b\n",
			want:  []string{"ran because the environment variable B changed"}},
		{name: "inserted", before: "FROM BASE\nRUN echo u\n", after: "FROM BASE\nRUN echo u0\nRUN echo u\n",
			want: []string{"ran because no earlier run of it is known", follows + "[2/3] RUN echo u0 and followed FROM BASE before"}},
		{name: "removed", before: "FROM BASE\nRUN echo v0\nRUN echo v\n", after: "FROM BASE\nRUN echo v\n", want: []string{follows + "[1/2] FROM BASE@"}},
		{name: "swapped", before: "FROM BASE\nRUN echo w\nRUN echo x\n", after: "FROM BASE\nRUN echo x\nRUN echo w\n",
			want: []string{follows + "[1/3] FROM BASE@", follows + "[2/3] RUN echo x and followed FROM BASE before"}},
		{name: "tag moved", before: "FROM MOVED AS a\nFROM BASE\nCOPY --from=a /f /f\n", change: func() { d.push(moved, "2").must(d.t) },
			want: []string{"ran because the base image MOVED changed from ", "ran because f changed (the base image MOVED changed from "}},
		{name: "file of a server", before: "FROM BASE\nADD HTTP/f.txt /f\n", change: func() { r.set("/f.txt", "two") },
			want: []string{"ran because the file at HTTP/f.txt changed from ", "ran because f.txt changed (the file at HTTP/f.txt changed from "}},
		{name: "branch moved", before: "FROM BASE\nADD GIT#main /g\n", change: func() { r.repo.Commit(map[string]string{"a": "3"}) },
			want: []string{"ran because the commit of GIT changed from ", "ran because a changed (the commit of GIT changed from "}},
		{name: "linked", before: "FROM BASE\nCOPY f /y\n", after: "FROM BASE\nCOPY --link f /y\n",
			want: []string{"ran, probably because its command changed; it was COPY f /y", "ran because no earlier run of it is known"}},
		{name: "removed, and no import", before: "FROM BASE\nRUN echo z\n", change: func() { d.buildctl("prune", "--all").must(d.t) }, more: []string{"--import-cache", "type=registry,ref=127.0.0.1:1/none"},
			want: slices.Repeat([]string{"ran because its result was removed by prune at 20"}, 2)},
	} {
		t.Run(c.name, func(t *testing.T) {
			d.t = t
			in := func(s string) string { return r.in(strings.ReplaceAll(s, "MOVED", moved)) }
			dir := files{"Dockerfile": in(c.before), "f": "f"}.write(t)
			d.kiln(slices.Concat([]string{"build"}, c.args, []string{dir})...).must(t)
			if c.after != "" {
				if err := os.WriteFile(filepath.Join(dir, "Dockerfile"), []byte(in(c.after)), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if c.change != nil {
				c.change()
			}
			d.kiln(slices.Concat([]string{"build"}, c.args, c.more, []string{dir})...).must(t)
			said := d.kiln("explain").must(t).stdout
			var got []string
			for line := range strings.Lines(said) {
				if line = strings.TrimSpace(line); strings.HasPrefix(line, "ran") {
					got = append(got, line)
				}
			}
			if !slices.EqualFunc(got, c.want, func(got, want string) bool { return strings.HasPrefix(got, in(want)) }) {
				t.Errorf("explain says\n%s\nwant\n%s", said, in(strings.Join(c.want, "\n")))
			}
		})
	}
	d.t = t
}

// What the garbage collection removed is said with its rule, as the client lists
// the rules, and when; in upstream's client, too, and after a restart.
func TestExplainNamesTheRule(t *testing.T) {
	d := newDaemonWithConfig(t, "[[worker.oci.gcpolicy]]\nfilters = [\"type==exec.cachemount\"]\nkeepDuration = 3600\n[[worker.oci.gcpolicy]]\nall = true\nmaxUsedSpace = 1000000\n")
	if rules := d.buildctl("debug", "workers", "-v").must(t).stdout; !strings.Contains(rules, "GC Policy rule#1") {
		t.Fatalf("rules:\n%s", rules)
	}
	dir := files{"Dockerfile": strings.ReplaceAll("FROM BASE\nRUN head -c 2000000 /dev/urandom > /big\n", "BASE", env.base)}.write(t)
	d.kiln("build", dir).must(t)
	collected := func() {
		t.Helper()
		if err := harness.WaitFor(time.Minute, func() error {
			if r := d.buildctl("du", "--filter", "description~=urandom"); strings.Contains(r.stdout, "false") || strings.Contains(r.stdout, "true") {
				return fmt.Errorf("the step's result is there:\n%s", r.stdout)
			}
			return nil
		}); err != nil {
			t.Fatalf("%v\n%s", err, d.log)
		}
	}
	collected()
	const want = "its result was removed by gc rule#1 at 20"
	if out := d.dockerfileIn(dir, "--opt", "kiln.explain=1", "--progress", "plain").must(t).stderr; !strings.Contains(out, "kiln: ran because "+want) {
		t.Errorf("upstream's client shows\n%s", out)
	}
	collected()
	d.stop()
	d.start()
	d.kiln("build", dir).must(t)
	if out := d.kiln("explain").must(t).stdout; !strings.Contains(out, "ran because "+want) || !strings.Contains(out, ", nothing changed\n") {
		t.Errorf("explain says\n%s", out)
	}
}
