//go:build e2e

package oci

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"
)

// atOnce is how many programs run at the same time: they mostly wait.
const atOnce = 8

// limit is how long one program may take; the slowest takes ten seconds.
const limit = 3 * time.Minute

// namesCgroup matches programs that all use the same cgroups.
var namesCgroup = regexp.MustCompile("^(linux_cgroups_|delete_resources$|delete_only_create_resources$)")

// run runs a program with a runtime, and removes the containers that it leaves.
func run(program, runtime string) (_ result, err error) {
	scratch, err := os.MkdirTemp(env.dir, "run-")
	if err != nil {
		return result{}, err
	}
	// Roots of user namespaces that aren't this one have to get through.
	if err := os.Chmod(scratch, 0o755); err != nil {
		return result{}, err
	}
	state := filepath.Join(scratch, "state")
	var out, errs bytes.Buffer
	ctx, cancel := context.WithTimeoutCause(context.Background(), limit, fmt.Errorf("it takes longer than %s", limit))
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(env.dir, "bin", program))
	cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.WaitDelay = filepath.Join(env.dir, "work"), &out, &errs, time.Second
	cmd.Env = append(os.Environ(), "RUNTIME="+wrapper(runtime), "TMPDIR="+scratch, stateVariable+"="+state)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS} // so that no runtime mounts on the machine
	rerr := cmd.Run()
	if err := errors.Join(deleteAll(runtime, state), os.RemoveAll(scratch)); err != nil {
		return result{}, err
	}
	r, err := parse(out.String())
	switch exit := (*exec.ExitError)(nil); {
	case ctx.Err() != nil:
		err = errors.Join(err, context.Cause(ctx))
	case errors.As(rerr, &exit):
		r.failed = append(r.failed, fmt.Sprintf("%v: %s", rerr, strings.ReplaceAll(errs.String(), "\n", " ")))
	default:
		err = errors.Join(err, rerr)
	}
	return r, err
}

// deleteAll deletes the containers below state.
func deleteAll(runtime, state string) error {
	entries, err := os.ReadDir(state)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		cmd := exec.Command(wrapper(runtime), "delete", "--force", e.Name())
		cmd.Env = append(os.Environ(), stateVariable+"="+state)
		if out, derr := cmd.CombinedOutput(); derr != nil {
			err = errors.Join(err, fmt.Errorf("%s delete %s: %w: %s", runtime, e.Name(), derr, out))
		}
	}
	return err
}

// job is a program to run with a runtime.
type job struct{ program, runtime string }

// runAll runs programs with all runtimes.
func runAll(t *testing.T, programs []string) map[job]result {
	var mu sync.Mutex // guards results
	results := map[job]result{}
	perform := func(jobs <-chan job) {
		for j := range jobs {
			r, err := run(j.program, j.runtime)
			switch {
			case err != nil && j.runtime == ours:
				t.Errorf("%s: %v", j.program, err)
			case err != nil:
				t.Logf("%s with %s: %v", j.program, j.runtime, err)
			}
			mu.Lock()
			results[j] = r
			mu.Unlock()
		}
	}
	beside, alone := make(chan job), make(chan job, len(programs)*len(env.runtimes))
	var workers sync.WaitGroup
	for range atOnce {
		workers.Go(func() { perform(beside) })
	}
	workers.Go(func() { perform(alone) })
	for _, program := range programs {
		to := beside
		if namesCgroup.MatchString(program) {
			to = alone
		}
		for _, runtime := range env.runtimes {
			if runtime == ours || program != mountsOnMachine {
				to <- job{program, runtime}
			}
		}
	}
	close(beside)
	close(alone)
	workers.Wait()
	return results
}

func TestAsTheSpecificationSays(t *testing.T) {
	programs := slices.Clone(env.programs)
	if _, err := os.Stat("/sys/fs/cgroup/pids"); err != nil {
		t.Logf("not run: %s, which know cgroups of version 1 alone", namesCgroup)
		programs = slices.DeleteFunc(programs, namesCgroup.MatchString)
	}
	results := runAll(t, programs)
	if len(programs) < 40 {
		t.Errorf("%d programs", len(programs))
	}
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "checks passed/failed\t%s\n", strings.Join(env.runtimes, "\t"))
	used := map[int]bool{}
	for _, program := range programs {
		fmt.Fprint(w, program)
		for _, runtime := range env.runtimes {
			if r, ran := results[job{program, runtime}]; ran {
				fmt.Fprintf(w, "\t%s", r)
			} else {
				fmt.Fprint(w, "\t-")
			}
		}
		fmt.Fprintln(w)
		judge(t, program, again(t, program, results[job{program, ours}]), used)
	}
	w.Flush()
	t.Logf("\n%s", &table)
	for i, k := range known {
		if !used[i] && !k.machine {
			t.Errorf("%s doesn't fail %q, as listed (%s)", k.program, k.failure, k.reason)
		}
	}
}

// attempts is how often a racy program is run again.
const attempts = 5

// again runs a racy program that failed until it doesn't.
func again(t *testing.T, program string, r result) result {
	t.Helper()
	why, races := racy[program]
	for n := 0; races && len(r.failed) > 0 && n < attempts; n++ {
		t.Logf("%s failed, and is run again: %s", program, why)
		var err error
		if r, err = run(program, ours); err != nil {
			t.Errorf("%s: %v", program, err)
		}
	}
	return r
}

// mountsOnMachine has a container without a mount namespace, which kilnrun
// refuses. Others mount its /proc, /dev and /sys on the machine, and the program
// removes the directory with all that is in it.
const mountsOnMachine = "linux_ns_itype"

// judge fails for what isn't listed.
func judge(t *testing.T, program string, r result, used map[int]bool) {
	t.Helper()
	if r.passed+len(r.failed) == 0 && !slices.Contains(silent, program) {
		t.Errorf("%s checks nothing", program)
	}
	for _, text := range r.failed {
		listed := false
		for i, k := range known {
			if k.program == program && regexp.MustCompile(k.failure).MatchString(text) {
				used[i], listed = true, true
			}
		}
		if !listed {
			t.Errorf("%s: kilnrun fails: %s", program, text)
		}
	}
}

// What is listed is of a program that there is, and has its reason.
func TestKnown(t *testing.T) {
	names := slices.AppendSeq(slices.Clone(silent), maps.Keys(racy))
	for _, k := range known {
		names = append(names, k.program)
		if k.reason == "" || k.failure == "" {
			t.Errorf("%+v: incomplete", k)
		}
	}
	all := map[string]bool{}
	for _, name := range env.programs {
		all[name] = true
	}
	for _, name := range names {
		if !all[name] {
			t.Errorf("no program %s, but %v", name, slices.Sorted(maps.Keys(all)))
		}
	}
}
