//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/executor/sandboxtest"
)

// attacks are tried in a real daemon: as steps, as the first process of a
// container that a client asks for over the wire, and as a further one in it.
type attacks struct {
	*daemon
	env   string // lines of a Dockerfile
	cases []sandboxtest.Case
}

// newAttacks starts a daemon that has something to be stolen. An attack that says
// "got" whatever the sandbox does shows that the others are heard.
func newAttacks(t *testing.T) attacks {
	t.Helper()
	secret := filepath.Join(t.TempDir(), "secret")
	for dir := filepath.Dir(secret); dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(secret, []byte("of the machine"), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Setenv("KILN_DAEMON_TOKEN", "x")
	cases := append(slices.Clone(sandboxtest.Cases), sandboxtest.Case{Item: control, Attack: "echo got"})
	slices.SortStableFunc(cases, func(a, b sandboxtest.Case) int { // a container that is spoilt is no use for others
		return len(fmt.Sprint(b.Spoils)) - len(fmt.Sprint(a.Spoils))
	})
	return attacks{newDaemon(t), fmt.Sprintf("ENV SECRET=%s\nENV DAEMON=kilnd\n", secret), cases}
}

const control = "control"

// check fails for each attack that got at something, or said nothing.
func (a attacks) check(how string, said []string) {
	a.t.Helper()
	if len(said) != len(a.cases) {
		a.t.Errorf("%s: %d attacks of %d were tried: %q", how, len(said), len(a.cases), said)
		return
	}
	for i, c := range a.cases {
		if got := strings.Contains(said[i], "got"); got != (c.Item == control) {
			a.t.Errorf("%s: %s: the attack says %q", how, c.Item, said[i])
		}
	}
}

// asSteps tries each in a step of its own.
func (a attacks) asSteps() {
	a.t.Helper()
	ctx, dockerfile := files{}, "FROM BASE AS b\n"+a.env+"COPY attacks /attacks\nRUN mkdir /said\n"
	for i, c := range a.cases {
		ctx[fmt.Sprintf("attacks/%d", i)] = c.Attack
		flag := ""
		if c.NoNetwork {
			flag = "--network=none "
		}
		// What it says goes through a pipe, as what the step itself says does.
		dockerfile += fmt.Sprintf("RUN %ssh -c \"$(cat /attacks/%d)\" 2>/dev/null | cat > /said/%[2]d\n", flag, i)
	}
	out := a.local(dockerfile+"FROM scratch\nCOPY --from=b /said /\n", ctx)
	var said []string
	for i := range a.cases {
		said = append(said, readFile(a.t, out, fmt.Sprint(i)))
	}
	a.check("steps", said)
}

// script tries all in one shell, which says something before each.
func (a attacks) script() string {
	var b strings.Builder
	for _, c := range a.cases {
		fmt.Fprintf(&b, "echo %s\n( %s ) 2>/dev/null </dev/null\n", separator, c.Attack)
	}
	return b.String()
}

const separator = "---next---"

func split(said string) []string { return strings.Split(said, separator+"\n")[1:] }

// overTheWire tries all in a container that the client makes and runs processes
// in.
func (a attacks) overTheWire() {
	a.t.Helper()
	dockerfile := "FROM BASE\n" + a.env + "RUN --network=none exit 1\n"
	r := a.onError(dockerfile, a.script())
	r.fails(a.t, "exit code: 1")
	a.check("a container's first process", split(r.stdout))

	dir := files{"Dockerfile": strings.ReplaceAll(dockerfile, "BASE", env.base)}.write(a.t)
	ref := filepath.Join(a.t.TempDir(), "ref")
	client := a.client(filepath.Join(env.bin, "buildctl"), "build", "--on-error=shell", "--ref-file", ref, dir)
	s := startScreen(a.t, client)
	s.typed("echo is $((40+2))\n")
	s.await("is 42")
	id := readFile(a.t, ref)
	a.check("a further process", split(a.run(filepath.Join(env.bin, "buildctl"), a.script(), "debug", "exec", id).must(a.t).stdout))
	s.stdin.Close()
	if err := ended(a.t, client); err == nil {
		a.t.Error("the build didn't fail")
	}
}

// Steps and the containers of clients can't get out of their sandbox.
func TestAttacks(t *testing.T) {
	a := newAttacks(t)
	a.asSteps()
	a.overTheWire()
}

// Nor can those of an ordinary user's daemon.
func TestRootlessAttacks(t *testing.T) {
	asUser(t, 65536)
	a := newAttacks(t)
	a.asSteps()
	a.overTheWire()
}
