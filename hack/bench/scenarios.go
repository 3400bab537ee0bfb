package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// scenario is one kind of work. prepare makes its input once; warm brings a
// fresh daemon to the point where run begins, which is what is timed; check
// looks at the content of what came out, so that doing nothing can't win.
type scenario struct {
	name    string
	prepare func(dir, base string) error
	warm    func(*runner) error
	run     func(*runner) error
	check   func(*runner) error

	idle     bool         // nothing is to happen while it runs
	args     []string     // further flags of the daemons
	peerArgs []string     // and of buildkitd alone
	peerCan  func() error // why buildkitd can't; nil: it can
}

const (
	runSteps     = 50
	contextFiles = 20000
)

var scenarios = []scenario{
	noop("noop20", 20),
	noop("noop200", 200),
	runs("run50", "runs", ""),
	runs("run50-none", "runs", "none"),
	runs("run50-host", "runs", "host"),
	runs("run50-bridge", "runs", "bridge"),
	runs("run50-parallel", "stages", ""),
	runs("run50-parallel-none", "stages", "none"),
	runs("run50-parallel-bridge", "stages", "bridge"),
	{
		name: "log1g", prepare: prepareLog,
		warm:  func(r *runner) error { return r.build("base") },
		run:   func(r *runner) error { return r.build("log") },
		check: func(r *runner) error { return r.expect("log", "done", "1\n") },
	},
	{
		name: "context-first", prepare: prepareContext,
		warm:  func(r *runner) error { return nil },
		run:   func(r *runner) error { return r.build("context") },
		check: checkContext,
	},
	{
		name: "context-unchanged", prepare: prepareContext,
		warm:  func(r *runner) error { return r.build("context") },
		run:   func(r *runner) error { return r.build("context") },
		check: checkContext,
	},
	definition("wide1000", false, wide(1000)),
	definition("wide5000", false, wide(5000)),
	definition("wide5000-cached", true, wide(5000)),
	definition("chain100", false, chain(100)),
	definition("merge100", false, merge(100)),
	starting("start", emptyState),
	starting("start-empty", nothing),
	stored("records-memory", rest, workers, allKept),
	stored("restart", stop, start, allKept),
	stored("stop-start", nothing, restart, allKept), // the end has the last commit of the build in it
	stored("restart-cached", restart, func(r *runner) error { return r.buildDefinition() }, allKept),
	stored("du", nothing, du, allKept),
	stored("du-again", du, du, allKept),
	stored("prune", nothing, func(r *runner) error { return r.buildctl("prune", "--all") }, allGone),
	idle("idle"),
	{
		name: "cache-export", prepare: prepareCache,
		warm: buildCache,
		run:  exportCache,
		check: func(r *runner) error {
			if err := startOver(r); err != nil {
				return err
			}
			return checkCache(r)
		},
	},
	{
		name: "cache-import", prepare: prepareCache,
		warm:  exportAndStartOver,
		run:   func(r *runner) error { return r.build("cache", importCache(r)...) },
		check: checkCache,
	},
	{
		name: "cache-import-files", prepare: prepareCache,
		warm:  exportAndStartOver,
		run:   checkCache,
		check: checkCache,
	},
}

// runs builds 50 RUN in one kind of network, "" for the daemon's own: those of
// "runs" one after the other, those of "stages" side by side.
func runs(name, what, net string) scenario {
	s := scenario{
		name:  name,
		warm:  func(r *runner) error { return r.build("base") },
		run:   func(r *runner) error { return r.build(what, "--allow", "network.host") },
		check: func(r *runner) error { return r.expect(what, "49", "49\n", "--allow", "network.host") },
		args:  []string{"--allow-insecure-entitlement", "network.host"},
	}
	flag := ""
	switch net {
	case "none", "host":
		flag = "--network=" + net
	case "bridge":
		s.args = append(s.args, "--oci-worker-net", "bridge")
		s.peerArgs = []string{"--oci-cni-binary-dir", cniPlugins, "--oci-cni-pool-size", "16"}
		s.peerCan = peerHasBridge
	}
	s.prepare = func(dir, base string) error { return prepareRuns(dir, base, flag) }
	return s
}

// cniPlugins is where Debian has them.
const cniPlugins = "/usr/lib/cni"

// peerHasBridge: buildkitd makes its bridge with other programs.
func peerHasBridge() error {
	if _, err := os.Stat(filepath.Join(cniPlugins, "bridge")); err != nil {
		return fmt.Errorf("it needs Debian's containernetworking-plugins: %w", err)
	}
	if _, err := exec.LookPath("iptables"); err != nil {
		return fmt.Errorf("it needs iptables: %w", err)
	}
	return nil
}

// noop builds a cached Dockerfile of n steps again.
func noop(name string, n int) scenario {
	build := func(r *runner) error { return r.build("steps") }
	return scenario{
		name:    name,
		prepare: func(dir, base string) error { return prepareSteps(dir, base, n) },
		warm:    build,
		run:     build,
		check:   func(r *runner) error { return r.expect("steps", "done", fmt.Sprintf("%d\n", n-1)) },
	}
}

// cacheSteps is what a cache that is kept in a registry holds.
const cacheSteps = 32

// prepareCache writes steps that make something else each time they run: who has
// the same result has it from the cache.
func prepareCache(dir, base string) error {
	var df strings.Builder
	fmt.Fprintf(&df, "FROM %s AS build\n", base)
	for i := range cacheSteps / 2 {
		fmt.Fprintf(&df, "RUN head -c 262144 /dev/urandom > /r%d\nRUN sha256sum /r%d >> /done\n", i, i)
	}
	df.WriteString("FROM scratch\nCOPY --from=build /done /\n")
	return writeFile(filepath.Join(dir, "cache", "Dockerfile"), df.String())
}

// buildCache keeps what the steps made beside the disk's other results.
func buildCache(r *runner) error {
	return r.build("cache", "--output", "type=local,dest="+r.out+"-first")
}

func exportCache(r *runner) error {
	return r.build("cache", "--export-cache", "type=registry,mode=max,ref="+r.cacheRef())
}

func importCache(r *runner) []string {
	return []string{"--import-cache", "type=registry,ref=" + r.cacheRef()}
}

// cacheRef is a repository for each run, where no layer is known yet.
func (r *runner) cacheRef() string {
	return fmt.Sprintf("%s/cache%d", r.d.bench.registry, r.d.number)
}

// exportAndStartOver leaves a daemon that has nothing, and a cache in the registry.
func exportAndStartOver(r *runner) error {
	for _, do := range []func(*runner) error{buildCache, exportCache, startOver} {
		if err := do(r); err != nil {
			return err
		}
	}
	return nil
}

// starting times a start, up to the first answer, of a daemon that has been
// stopped, after first.
func starting(name string, first func(*runner) error) scenario {
	return scenario{
		name:    name,
		prepare: func(string, string) error { return nil },
		warm: func(r *runner) error {
			if err := stop(r); err != nil {
				return err
			}
			return first(r)
		},
		run:   start,
		check: func(r *runner) error { return r.buildctl("du") },
	}
}

// emptyState has the next daemon begin with an empty state directory.
func emptyState(r *runner) error {
	for i, a := range r.d.args {
		if a == "--root" {
			r.d.args[i+1] += "-next"
		}
	}
	return nil
}

// startOver begins with a daemon that has an empty state directory.
func startOver(r *runner) error {
	if err := stop(r); err != nil {
		return err
	}
	if err := emptyState(r); err != nil {
		return err
	}
	return start(r)
}

func checkCache(r *runner) error {
	want, err := os.ReadFile(filepath.Join(r.out+"-first", "done"))
	if err != nil {
		return err
	}
	return r.expect("cache", "done", string(want), importCache(r)...)
}

// expect builds the Dockerfile of name with its files to the client and
// compares one of them.
func (r *runner) expect(name, file, want string, args ...string) error {
	if err := os.RemoveAll(r.out); err != nil {
		return err
	}
	if err := r.build(name, append(args, "--output", "type=local,dest="+r.out)...); err != nil {
		return err
	}
	got, err := os.ReadFile(filepath.Join(r.out, file))
	if err != nil {
		return err
	}
	if string(got) != want {
		return fmt.Errorf("%s is %q, want %q", file, got, want)
	}
	return nil
}

func writeFile(path, text string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(text), 0o644)
}

// prepareSteps writes n mixed steps: RUN, COPY, ENV, WORKDIR.
func prepareSteps(dir, base string, n int) error {
	var df strings.Builder
	fmt.Fprintf(&df, "FROM %s AS build\n", base)
	for i := range n {
		switch i % 4 {
		case 0:
			fmt.Fprintf(&df, "WORKDIR /w%d\n", i)
		case 1:
			fmt.Fprintf(&df, "COPY f%d /f%d\n", i, i)
			if err := writeFile(filepath.Join(dir, "steps", fmt.Sprintf("f%d", i)), strings.Repeat("x", i)); err != nil {
				return err
			}
		case 2:
			fmt.Fprintf(&df, "ENV V%d=%d\n", i, i)
		case 3:
			fmt.Fprintf(&df, "RUN echo %d > /done\n", i)
		}
	}
	df.WriteString("FROM scratch\nCOPY --from=build /done /\n")
	return writeFile(filepath.Join(dir, "steps", "Dockerfile"), df.String())
}

// prepareRuns writes 50 RUN true in a row, with a flag of RUN, and 50 stages side
// by side.
func prepareRuns(dir, base, flag string) error {
	if err := writeFile(filepath.Join(dir, "base", "Dockerfile"), "FROM "+base+"\nRUN echo warm\n"); err != nil {
		return err
	}
	var runs, stages, copies strings.Builder
	fmt.Fprintf(&runs, "FROM %s AS build\n", base)
	for i := range runSteps {
		fmt.Fprintf(&runs, "RUN %s true %d\n", flag, i)
		fmt.Fprintf(&stages, "FROM %s AS s%d\nRUN %s echo %d > /%d\n", base, i, flag, i, i)
		fmt.Fprintf(&copies, "COPY --from=s%d /%d /\n", i, i)
	}
	fmt.Fprintf(&runs, "RUN echo %d > /%[1]d\nFROM scratch\nCOPY --from=build /%[1]d /\n", runSteps-1)
	if err := writeFile(filepath.Join(dir, "runs", "Dockerfile"), runs.String()); err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, "stages", "Dockerfile"), stages.String()+"FROM scratch\n"+copies.String())
}

// prepareLog writes a step that prints 1 GiB. buildkitd forgets what is beyond the
// 2 MiB that clients are shown; kiln stores it.
func prepareLog(dir, base string) error {
	if err := writeFile(filepath.Join(dir, "base", "Dockerfile"), "FROM "+base+"\nRUN echo warm\n"); err != nil {
		return err
	}
	return writeFile(filepath.Join(dir, "log", "Dockerfile"), "FROM "+base+" AS build\nRUN yes "+strings.Repeat("0123456789", 6)+
		" | head -c 1024m; echo 1 > /done\nFROM scratch\nCOPY --from=build /done /\n")
}

// prepareContext writes 20,000 small files, 217 MB, that no build step copies
// but one: what is timed is the transfer.
func prepareContext(dir, base string) error {
	rnd := rand.New(rand.NewPCG(1, 2))
	buf := make([]byte, 22<<10)
	for i := range contextFiles {
		n := rnd.IntN(len(buf))
		for j := range n {
			buf[j] = byte(rnd.Uint32())
		}
		path := filepath.Join(dir, "context", fmt.Sprintf("d%03d", i/100), fmt.Sprintf("f%02d", i%100))
		if err := writeFile(path, string(buf[:n])); err != nil {
			return err
		}
	}
	// A bind mount takes the whole context without copying it.
	return writeFile(filepath.Join(dir, "context", "Dockerfile"),
		"FROM "+base+" AS build\nRUN --mount=target=/ctx find /ctx -type f | wc -l > /n && cp /ctx/d123/f45 /f\nFROM scratch\nCOPY --from=build /n /f /\n")
}

func checkContext(r *runner) error {
	if err := r.expect("context", "n", fmt.Sprintf("%d\n", contextFiles+1)); err != nil {
		return err
	}
	got, err := os.ReadFile(filepath.Join(r.out, "f"))
	if err != nil {
		return err
	}
	want, err := os.ReadFile(filepath.Join(r.input, "context", "d123", "f45"))
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("a file of the context came out different")
	}
	return nil
}
