//go:build linux && (amd64 || arm64)

package container

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// shell is a hook of the machine's, or of busybox in the container.
func shell(script string) specs.Hook {
	return specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", script}, Env: []string{"PATH=/bin"}}
}

func readText(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return string(b)
}

// A hook that fails ends the container: nothing of it is left, hooks that come
// after it don't run, and those for its end do, once.
func TestHookFails(t *testing.T) {
	order := []string{"prestart", "createRuntime", "createContainer", "startContainer", "poststart"}
	for at, kind := range order {
		t.Run(kind, func(t *testing.T) {
			bundle, spec := newBundle(t, "read x </wait")
			log := filepath.Join(bundle, "rootfs/log")
			say := func(name, file string) []specs.Hook {
				if name == kind {
					return []specs.Hook{shell("echo refused; exit 3"), shell("echo no >>" + file)}
				}
				return []specs.Hook{shell("echo " + name + " >>" + file)}
			}
			spec.Hooks = &specs.Hooks{
				CreateRuntime: say(order[1], log), CreateContainer: say(order[2], log), StartContainer: say(order[3], "/log"),
				Poststart: say(order[4], log), Poststop: say("poststop", log),
			}
			//lint:ignore SA1019 deprecated, and used
			spec.Hooks.Prestart = say(order[0], log)
			ctx := context.Background()
			b, err := tryCreate(t, bundle, spec)
			if at >= 3 {
				if err != nil {
					t.Fatal(err)
				}
				err = b.Start(ctx)
				if _, lerr := b.r.Load(b.ID); !errors.Is(lerr, ErrNotExist) {
					t.Errorf("the container is loaded: %v", lerr)
				}
				// As callers do that don't know which error it was.
				if err := b.Delete(ctx, true); err != nil {
					t.Errorf("delete it again: %v", err)
				}
				if err := b.Delete(ctx, false); !errors.Is(err, ErrNotExist) {
					t.Errorf("delete it once more: %v", err)
				}
			}
			if err == nil || !strings.Contains(err.Error(), "run "+kind+" hook /bin/sh: exit status 3: refused") {
				t.Errorf("error %v", err)
			}
			want := strings.Join(append(append([]string{}, order[:at]...), "poststop"), "\n") + "\n"
			if got := readText(t, log); got != want {
				t.Errorf("hooks that ran: %q, want %q", got, want)
			}
		})
	}
}

// Nothing keeps a container from going away.
func TestPoststopHookFails(t *testing.T) {
	bundle, spec := newBundle(t, "exit 0")
	log := filepath.Join(bundle, "rootfs/log")
	spec.Hooks = &specs.Hooks{Poststop: []specs.Hook{shell("echo refused; exit 3"), shell("echo second >>" + log)}}
	b := createBox(t, bundle, spec)
	var warnings []error
	b.warn = func(err error) { warnings = append(warnings, err) }
	b.start()
	b.end()
	if err := b.Delete(context.Background(), false); err != nil {
		t.Errorf("delete: %v", err)
	}
	if len(warnings) != 1 || !strings.Contains(warnings[0].Error(), "run poststop hook /bin/sh: exit status 3: refused") {
		t.Errorf("warnings %v", warnings)
	}
	if got := readText(t, log); got != "second\n" {
		t.Errorf("after the hook that failed: %q", got)
	}
}

// Hooks in the container know its process as it is seen there.
func TestHookPids(t *testing.T) {
	bundle, spec := newBundle(t, "read x </wait")
	log := filepath.Join(bundle, "rootfs/log")
	hook := func(file string) []specs.Hook { return []specs.Hook{shell("cat >>" + file + "; echo >>" + file)} }
	spec.Hooks = &specs.Hooks{CreateRuntime: hook(log), CreateContainer: hook(log), StartContainer: hook("/log"), Poststart: hook(log)}
	b := createBox(t, bundle, spec)
	b.start()
	var got []int
	for line := range strings.Lines(readText(t, log)) {
		var s specs.State
		if err := json.Unmarshal([]byte(line), &s); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		got = append(got, s.Pid)
	}
	if len(got) != 4 || got[0] != b.Pid || got[1] != 1 || got[2] != 1 || got[3] != b.Pid {
		t.Errorf("pids %v, of process %d", got, b.Pid)
	}
	release(t, bundle)
	b.end()
}

// A hook has the arguments and the environment that it was given, and nothing
// of this process's.
func TestHookSurroundings(t *testing.T) {
	t.Setenv("KILN_OF_THE_CALLER", "x")
	bundle, spec := newBundle(t, "exit 0")
	log := filepath.Join(bundle, "rootfs/log")
	// Two of each: with an environment, and without one.
	hooks := func(kind, file string) []specs.Hook {
		script := "(echo " + kind + " $0 $1; /bin/busybox env | /bin/busybox grep -e ^A -e KILN; true) >>" + file
		with := specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", script, "zero", "one"}, Env: []string{"A=b c", "A2="}}
		without := with
		without.Env = nil
		return []specs.Hook{with, without}
	}
	spec.Hooks = &specs.Hooks{
		CreateRuntime: hooks("createRuntime", log), CreateContainer: hooks("createContainer", log), StartContainer: hooks("startContainer", "/log"),
		Poststart: hooks("poststart", log), Poststop: hooks("poststop", log),
	}
	//lint:ignore SA1019 deprecated, and used
	spec.Hooks.Prestart = hooks("prestart", log)
	b := createBox(t, bundle, spec)
	b.start()
	b.end()
	if err := b.Delete(context.Background(), false); err != nil {
		t.Fatal(err)
	}
	want := ""
	for _, kind := range []string{"prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"} {
		line := kind + " zero one\n"
		want += line + "A=b c\nA2=\n" + line
	}
	if got := readText(t, log); got != want {
		t.Errorf("hooks have\n%s\nwant\n%s", got, want)
	}
}

func TestCheckHooks(t *testing.T) {
	none, minute := 0, 60
	for want, h := range map[string]*specs.Hooks{
		"":                                     {Poststop: []specs.Hook{{Path: "/bin/true", Timeout: &minute}}},
		`hooks.poststart: path "true" must be`: {Poststart: []specs.Hook{{Path: "true"}}},
		"hooks.createContainer: timeout 0 of /a m": {CreateContainer: []specs.Hook{{Path: "/a", Timeout: &none}}},
	} {
		s := Example()
		s.Hooks = h
		if err := check(s); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	}
}
