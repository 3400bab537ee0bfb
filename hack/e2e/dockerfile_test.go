//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// outCase is a Dockerfile whose last stage is exported and looked at.
type outCase struct {
	name       string
	dockerfile string
	ctx        files
	args       []string
	want       map[string]string // content by path of the result
	check      func(t *testing.T, out string)
}

func runOutCases(t *testing.T, cases []outCase) {
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			d := newDaemon(t)
			out := d.local(c.dockerfile, c.ctx, c.args...)
			for name, want := range c.want {
				if got := readFile(t, out, name); got != want {
					t.Errorf("%s = %q, want %q", name, got, want)
				}
			}
			if c.check != nil {
				c.check(t, out)
			}
		})
	}
}

// outOf is a Dockerfile that runs body in the base image and keeps /out.
func outOf(body string) string {
	return "FROM BASE AS b\nRUN mkdir /out\n" + body + "\nFROM scratch\nCOPY --from=b /out /\n"
}

func lines(s ...string) string { return strings.Join(s, "\n") + "\n" }

func stat(t *testing.T, elem ...string) *syscall.Stat_t {
	t.Helper()
	fi, err := os.Lstat(filepath.Join(elem...))
	if err != nil {
		t.Fatal(err)
	}
	return fi.Sys().(*syscall.Stat_t)
}

// compat: DF-070, DF-071, DF-073, DF-050, DF-060, DF-102, DF-053
func TestStagesAndVariables(t *testing.T) {
	runOutCases(t, []outCase{
		{
			name:       "RunShellForm",
			dockerfile: outOf("RUN echo a b > /out/f && echo c >> /out/f"),
			want:       map[string]string{"f": "a b\nc\n"},
		},
		{
			name:       "RunExecForm",
			dockerfile: outOf(`RUN ["/bin/sh", "-c", "echo \"$0\" > /out/f", "$HOME"]`),
			want:       map[string]string{"f": "$HOME\n"},
		},
		{
			name:       "RunHeredoc",
			dockerfile: outOf("RUN <<EOF\nset -e\nx=1\necho $x > /out/f\nEOF"),
			want:       map[string]string{"f": "1\n"},
		},
		{
			name:       "RunHeredocWithShebang",
			dockerfile: outOf("RUN <<EOF\n#!/bin/awk -f\nBEGIN { print 6*7 > \"/out/f\" }\nEOF"),
			want:       map[string]string{"f": "42\n"},
		},
		{
			name:       "ArgBeforeFrom",
			dockerfile: "ARG IMG=nothing\nARG V=global\nFROM ${IMG} AS b\nARG V\nARG W=${V}-w\nRUN mkdir /out && echo $V $W > /out/f\nFROM scratch\nCOPY --from=b /out /\n",
			args:       []string{"--opt", "build-arg:IMG=" + "BASEREF", "--opt", "build-arg:V=given"},
			want:       map[string]string{"f": "given given-w\n"},
		},
		{
			name: "ExpansionForms",
			dockerfile: outOf(lines(
				`ENV A=abc.tar.gz E=`,
				`ENV R1=${A:-x} R2=${E:-x} R3=${A:+y} R4=${E:+y} R5=${E-z} R6=${U-z}`,
				`ENV R7=${A#*.} R8=${A##*.} R9=${A%.*} R10=${A%%.*} R11=${A/a/X} R12=${A//a/X}`,
				`ENV Q1='$A' Q2="$A" Q3=\$A`,
				`RUN env | grep -E '^(R|Q)[0-9]' | sort -t = -k 1,1 > /out/f`)),
			want: map[string]string{"f": lines("Q1=$A", "Q2=abc.tar.gz", "Q3=$A", "R1=abc.tar.gz", "R10=abc", "R11=Xbc.tar.gz", "R12=Xbc.tXr.gz",
				"R2=x", "R3=y", "R4=", "R5=", "R6=z", "R7=tar.gz", "R8=gz", "R9=abc.tar")},
		},
		{
			name:       "EnvWinsOverArg",
			dockerfile: outOf("ARG V=arg\nENV V=env\nRUN echo $V > /out/f"),
			args:       []string{"--opt", "build-arg:V=given"},
			want:       map[string]string{"f": "env\n"},
		},
		{
			name:       "SameLineRule",
			dockerfile: outOf("ENV A=old\nENV A=new B=$A\nRUN echo $A $B > /out/f"),
			want:       map[string]string{"f": "new old\n"},
		},
		{
			name:       "Target",
			dockerfile: "FROM scratch AS one\nCOPY f /one\nFROM scratch AS two\nCOPY f /two\nFROM scratch AS three\nCOPY f /three\n",
			ctx:        files{"f": "x"},
			args:       []string{"--opt", "target=two"},
			want:       map[string]string{"two": "x"},
		},
		{
			name:       "UnusedStageIsNotRun",
			dockerfile: "FROM BASE AS broken\nRUN exit 1\nFROM no-such-host.invalid/x AS missing\nRUN true\nFROM scratch\nCOPY f /\n",
			ctx:        files{"f": "x"},
			want:       map[string]string{"f": "x"},
		},
		{
			name:       "StageFromStage",
			dockerfile: "FROM BASE AS a\nENV V=1\nRUN mkdir /out; echo a > /out/a\nFROM a AS b\nRUN echo $V > /out/b\nFROM scratch\nCOPY --from=b /out /\n",
			want:       map[string]string{"a": "a\n", "b": "1\n"},
		},
		{
			name:       "CopyFromImageAndIndex",
			dockerfile: "FROM BASE\nRUN mkdir /out; echo 0 > /out/zero\nFROM scratch\nCOPY --from=0 /out/zero /\nCOPY --from=BASE /etc/passwd /passwd\n",
			check: func(t *testing.T, out string) {
				if got := readFile(t, out, "passwd"); !strings.HasPrefix(got, "root:x:0:0:") {
					t.Errorf("passwd = %q", got)
				}
			},
			want: map[string]string{"zero": "0\n"},
		},
		{
			name:       "ShellInstruction",
			dockerfile: outOf("SHELL [\"/bin/busybox\", \"sh\", \"-e\", \"-c\"]\nRUN false || echo $- > /out/f"),
			check: func(t *testing.T, out string) {
				if got := readFile(t, out, "f"); !strings.Contains(got, "e") {
					t.Errorf("shell options = %q, want e among them", got)
				}
			},
		},
		{
			name:       "OnbuildOfStage",
			dockerfile: "FROM BASE AS parent\nONBUILD RUN mkdir /out && echo trigger > /out/f\nFROM parent AS b\nFROM scratch\nCOPY --from=b /out /\n",
			want:       map[string]string{"f": "trigger\n"},
		},
		{
			name:       "PlatformArgs",
			dockerfile: outOf("ARG TARGETOS\nARG TARGETSTAGE\nARG BUILDPLATFORM\nRUN echo $TARGETOS $TARGETSTAGE > /out/f; test -n \"$BUILDPLATFORM\""),
			want:       map[string]string{"f": "linux default\n"},
		},
	})
}

// compat: LLB-020, LLB-022, LLB-023, LLB-024, LLB-028, DF-080, DF-095, DF-096, DF-027, DF-028, DF-029, DF-032
func TestRunEnvironment(t *testing.T) {
	runOutCases(t, []outCase{
		{
			name:       "WorkdirIsMadeAndRelative",
			dockerfile: outOf("WORKDIR /a\nWORKDIR b\nRUN pwd > /out/f; stat -c %a:%u /a/b >> /out/f"),
			want:       map[string]string{"f": "/a/b\n755:0\n"},
		},
		{
			name:       "UserByName",
			dockerfile: outOf("RUN chmod 777 /out\nUSER daemon\nRUN id -u > /out/f; id -g >> /out/f; id -G >> /out/f"),
			want:       map[string]string{"f": "1\n1\n1 10\n"},
		},
		{
			name:       "UserByIDs",
			dockerfile: outOf("RUN chmod 777 /out\nUSER 1234:4321\nRUN echo $(id -u):$(id -g) > /out/f"),
			want:       map[string]string{"f": "1234:4321\n"},
		},
		{
			name:       "HostsAndHostname",
			dockerfile: outOf("RUN grep -c 192.0.2.7.*other.test /etc/hosts > /out/f; hostname >> /out/f"),
			args:       []string{"--opt", "add-hosts=other.test=192.0.2.7", "--opt", "hostname=here"},
			want:       map[string]string{"f": "1\nhere\n"},
		},
		{
			name:       "DefaultHostname",
			dockerfile: outOf("RUN hostname > /out/f; grep -c buildkitsandbox /etc/hosts >> /out/f"),
			want:       map[string]string{"f": "buildkitsandbox\n1\n"},
		},
		{
			name:       "NetworkNoneHasLoopbackOnly",
			dockerfile: outOf("RUN --network=none ls /sys/class/net > /out/f; cat /sys/class/net/lo/operstate > /dev/null; ip addr show lo | grep -c 127.0.0.1 >> /out/f"),
			want:       map[string]string{"f": "lo\n1\n"},
		},
		{
			name:       "Ulimit",
			dockerfile: outOf("RUN ulimit -n > /out/f"),
			args:       []string{"--opt", "ulimit=nofile=123:456"},
			want:       map[string]string{"f": "123\n"},
		},
		{
			name:       "ShmSize",
			dockerfile: outOf("RUN df -k /dev/shm | tail -1 | awk '{print $2}' > /out/f"),
			args:       []string{"--opt", "shm-size=8388608"},
			want:       map[string]string{"f": "8192\n"},
		},
		{
			name:       "IsolatedProcesses",
			dockerfile: outOf("RUN echo $$ > /out/pid; ls /proc | grep -c '^[0-9]' > /out/n"),
			check: func(t *testing.T, out string) {
				var n int
				fmt.Sscan(readFile(t, out, "n"), &n)
				if pid := readFile(t, out, "pid"); pid != "1\n" || n > 4 {
					t.Errorf("pid %q, %d processes seen, want pid 1 and few", pid, n)
				}
			},
		},
		{
			name:       "MaskedPathsAndCapabilities",
			dockerfile: outOf("RUN wc -c < /proc/keys > /out/f; grep CapEff /proc/self/status | tr -s '\\t' ' ' >> /out/f; grep -c Seccomp:.*2 /proc/self/status >> /out/f; touch /proc/sys/kernel/domainname 2>/dev/null || echo ro >> /out/f"),
			want:       map[string]string{"f": "0\nCapEff: 00000000a80425fb\n1\nro\n"},
		},
		{
			name:       "NothingOfTheSandboxIsKept",
			dockerfile: "FROM BASE AS b\nRUN true\nFROM scratch\nCOPY --from=b /etc /etc\nCOPY --from=b / /all\n",
			check: func(t *testing.T, out string) {
				for _, name := range []string{"etc/resolv.conf", "etc/hosts", "all/dev/null", "all/proc/1", "all/sys/class"} {
					if _, err := os.Lstat(filepath.Join(out, name)); err == nil {
						t.Errorf("%s is in the result", name)
					}
				}
			},
		},
		{
			name:       "ProxyArgsAreSeenAndNotKept",
			dockerfile: outOf("RUN echo $http_proxy $HTTP_PROXY > /out/f"),
			args:       []string{"--opt", "build-arg:http_proxy=http://192.0.2.1:3128"},
			want:       map[string]string{"f": "http://192.0.2.1:3128 http://192.0.2.1:3128\n"},
		},
	})
}

// compat: LLB-067, LLB-068, LLB-070, LLB-072, LLB-073, DF-090, DF-091, DF-094, DF-103, DF-105, DF-087
func TestCopyAndAdd(t *testing.T) {
	ctx := files{"a.txt": "a", "b.txt": "b", "dir/x": "x", "dir/sub/y": "y", "link": "->a.txt", "empty/": "", "dirlink": "->dir"}
	runOutCases(t, []outCase{
		{name: "FileToName", dockerfile: "FROM scratch\nCOPY a.txt /z\n", ctx: ctx, want: map[string]string{"z": "a"}},
		{name: "FileToDirectory", dockerfile: "FROM scratch\nCOPY a.txt b.txt /d/\n", ctx: ctx, want: map[string]string{"d/a.txt": "a", "d/b.txt": "b"}},
		{name: "DirectoryContents", dockerfile: "FROM scratch\nCOPY dir /d\n", ctx: ctx, want: map[string]string{"d/x": "x", "d/sub/y": "y"}},
		{name: "Wildcard", dockerfile: "FROM scratch\nCOPY *.txt /d/\n", ctx: ctx, want: map[string]string{"d/a.txt": "a", "d/b.txt": "b"}},
		{name: "RelativeToWorkdir", dockerfile: "FROM scratch\nWORKDIR /w\nCOPY a.txt .\n", ctx: ctx, want: map[string]string{"w/a.txt": "a"}},
		{name: "SymlinkedSource", dockerfile: "FROM scratch\nCOPY link /z\nCOPY dirlink/x /x\n", ctx: ctx, want: map[string]string{"z": "a", "x": "x"}},
		{name: "Exclude", dockerfile: "FROM scratch\nCOPY --exclude=*.txt . /d/\n", ctx: ctx, want: map[string]string{"d/dir/x": "x"},
			check: func(t *testing.T, out string) {
				if _, err := os.Stat(filepath.Join(out, "d/a.txt")); err == nil {
					t.Error("an excluded file was copied")
				}
			}},
		{name: "Parents", dockerfile: "FROM scratch\nCOPY --parents dir/sub/y /p/\n", ctx: ctx, want: map[string]string{"p/dir/sub/y": "y"}},
		{name: "EmptyDirectory", dockerfile: "FROM scratch\nCOPY empty /e\n", ctx: ctx, check: func(t *testing.T, out string) {
			if st := stat(t, out, "e"); st.Mode&syscall.S_IFMT != syscall.S_IFDIR {
				t.Error("e is no directory")
			}
		}},
		{name: "Heredoc", dockerfile: "FROM scratch\nARG V=v\nCOPY <<a <<'b' /d/\n$V\na\n$V\nb\n", want: map[string]string{"d/a": "v\n", "d/b": "$V\n"}},
		{name: "Link", dockerfile: "FROM BASE AS b\nCOPY --link a.txt /x/y/z\nRUN mkdir /out && cp /x/y/z /out/\nFROM scratch\nCOPY --from=b /out /\n", ctx: ctx, want: map[string]string{"z": "a"}},
		{
			name:       "ChownChmod",
			dockerfile: outOf("COPY --chown=daemon:wheel --chmod=0640 a.txt /f\nCOPY --chown=7:8 --chmod=u=rwX,go=rX dir /g\nRUN stat -c '%n %U:%G %a' /f > /out/f; stat -c '%u:%g %a' /g /g/x >> /out/f"),
			ctx:        ctx,
			want:       map[string]string{"f": "/f daemon:wheel 640\n7:8 755\n7:8 644\n"},
		},
		{
			name:       "OverwriteAndMerge",
			dockerfile: "FROM scratch\nCOPY dir /d\nCOPY a.txt /d/x\nCOPY b.txt /d/sub/\n", ctx: ctx,
			want: map[string]string{"d/x": "a", "d/sub/y": "y", "d/sub/b.txt": "b"},
		},
		{
			name:       "DestinationThroughSymlink",
			dockerfile: outOf("RUN mkdir /real && ln -s /real /ln && ln -s /../../etc /out/escape\nCOPY a.txt /ln/\nCOPY a.txt /out/escape/zzz\nRUN cp /real/a.txt /out/f; cat /etc/zzz > /out/g; rm /out/escape"),
			ctx:        ctx, want: map[string]string{"f": "a", "g": "a"},
		},
		{
			name:       "Dockerignore",
			dockerfile: "FROM scratch\nCOPY . /\n",
			ctx:        files{"keep": "k", "drop": "d", "dir/a.log": "l", "dir/b.log": "m", ".dockerignore": "# comment\ndrop\n**/*.log\n!dir/b.log\nDockerfile\n"},
			want:       map[string]string{"keep": "k", "dir/b.log": "m"},
			check: func(t *testing.T, out string) {
				for _, name := range []string{"drop", "dir/a.log", "Dockerfile"} {
					if _, err := os.Lstat(filepath.Join(out, name)); err == nil {
						t.Errorf("%s was not ignored", name)
					}
				}
			},
		},
	})
}

// compat: LLB-040, LLB-044, LLB-046, LLB-047, LLB-030, DF-074, DF-075, DF-076, DF-077, DF-078
func TestRunMounts(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "s")
	if err := os.WriteFile(secret, []byte("hush"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KILN_E2E_SECRET", "whisper")
	runOutCases(t, []outCase{
		{
			name:       "BindContext",
			dockerfile: outOf("RUN --mount=target=/ctx cp /ctx/f /out/f; touch /ctx/g 2>/dev/null || echo ro > /out/g"),
			ctx:        files{"f": "x"}, want: map[string]string{"f": "x", "g": "ro\n"},
		},
		{
			name:       "BindFromStageWithSourceReadWrite",
			dockerfile: "FROM BASE AS src\nRUN mkdir -p /a/b && echo s > /a/b/f\nFROM BASE AS b\nRUN --mount=from=src,source=/a/b,target=/m,rw mkdir /out && cp /m/f /out/f && echo t > /m/f\nRUN --mount=from=src,source=/a/b,target=/m cp /m/f /out/g\nFROM scratch\nCOPY --from=b /out /\n",
			want:       map[string]string{"f": "s\n", "g": "s\n"},
		},
		{
			name:       "BindSingleFile",
			dockerfile: outOf("RUN --mount=source=f,target=/etc/one cat /etc/one > /out/f\nRUN test ! -e /etc/one"),
			ctx:        files{"f": "x"}, want: map[string]string{"f": "x"},
		},
		{
			name:       "CacheIsKeptAcrossSteps",
			dockerfile: outOf("RUN --mount=type=cache,target=/c echo 1 >> /c/f\nRUN --mount=type=cache,target=/c echo 2 >> /c/f\nRUN --mount=type=cache,target=/c cp /c/f /out/\nRUN test ! -e /c/f"),
			want:       map[string]string{"f": "1\n2\n"},
		},
		{
			name:       "CacheIDsFromAndMode",
			dockerfile: "FROM BASE AS seed\nRUN mkdir /s && echo seed > /s/f\nFROM BASE AS b\nRUN mkdir /out\nRUN --mount=type=cache,id=x,from=seed,source=/s,target=/c cp /c/f /out/f\nRUN --mount=type=cache,id=y,target=/c,mode=0700,uid=5,gid=6 stat -c %a:%u:%g /c > /out/g\nFROM scratch\nCOPY --from=b /out /\n",
			want:       map[string]string{"f": "seed\n", "g": "700:5:6\n"},
		},
		{
			name:       "CacheSharingModes",
			dockerfile: outOf("RUN --mount=type=cache,sharing=locked,id=l,target=/c echo l > /c/f\nRUN --mount=type=cache,sharing=private,id=p,target=/c echo p > /c/f\nRUN --mount=type=cache,sharing=locked,id=l,target=/a --mount=type=cache,sharing=private,id=p,target=/b cat /a/f /b/f > /out/f"),
			want:       map[string]string{"f": "l\np\n"},
		},
		{
			name:       "Tmpfs",
			dockerfile: outOf("RUN --mount=type=tmpfs,target=/t,size=4194304 df -k /t | tail -1 | awk '{print $1, $2}' > /out/f; touch /t/x\nRUN test ! -e /t/x"),
			want:       map[string]string{"f": "tmpfs 4096\n"},
		},
		{
			name:       "SecretFile",
			dockerfile: outOf("RUN --mount=type=secret,id=s cat /run/secrets/s > /out/f; stat -c %a:%u /run/secrets/s >> /out/f\nRUN test ! -e /run/secrets/s"),
			args:       []string{"--secret", "id=s,src=" + secret}, want: map[string]string{"f": "hush400:0\n"},
		},
		{
			name:       "SecretTargetModeOwner",
			dockerfile: outOf("RUN chmod 777 /out\nUSER daemon\nRUN --mount=type=secret,id=s,target=/x/y,mode=0440,uid=1,gid=10 cat /x/y > /out/f; stat -c %a:%u:%g /x/y >> /out/f"),
			args:       []string{"--secret", "id=s,src=" + secret}, want: map[string]string{"f": "hush440:1:10\n"},
		},
		{
			name:       "SecretEnv",
			dockerfile: outOf("RUN --mount=type=secret,id=s,env=TOKEN echo $TOKEN > /out/f; test ! -e /run/secrets/s"),
			args:       []string{"--secret", "id=s,src=" + secret}, want: map[string]string{"f": "hush\n"},
		},
		{
			name:       "SecretOfTheClientsEnvironment",
			dockerfile: outOf("RUN --mount=type=secret,id=KILN_E2E_SECRET --mount=type=secret,id=named cat /run/secrets/KILN_E2E_SECRET /run/secrets/named > /out/f"),
			args:       []string{"--secret", "id=KILN_E2E_SECRET", "--secret", "id=named,env=KILN_E2E_SECRET"}, want: map[string]string{"f": "whisperwhisper"},
		},
		{
			name:       "OptionalSecretMissing",
			dockerfile: outOf("RUN --mount=type=secret,id=nope test ! -e /run/secrets/nope && echo ok > /out/f"),
			want:       map[string]string{"f": "ok\n"},
		},
	})
}
