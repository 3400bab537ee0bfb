package control

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/client"
	"github.com/kilnbuild/kiln/internal/explanation"
	control "github.com/moby/buildkit/api/services/control"
	"google.golang.org/grpc/codes"
)

// project is a directory with a Dockerfile, and how it is built.
type project struct {
	t     testing.TB
	d     *daemon
	reg   *registry
	dir   string
	name  string
	opts  map[string]string
	anon  bool // the client doesn't say which directory it is
	fail  bool // the build is to fail
	quiet bool // build doesn't ask for the explanation
	logs  []byte
}

const projectFile = `ARG BASE=REGISTRY/library/base:latest
FROM ${BASE} AS build
ENV MODE=fast LEVEL=1
ARG VERSION=1.0
WORKDIR /NAME
COPY --chown=1:1 go.mod ./
COPY src ./src
RUN echo "NAME $VERSION $MODE" > /out.txt

FROM ${BASE}
COPY --from=build /out.txt /out.txt
RUN --mount=type=bind,source=conf,target=/conf cat /conf/app.conf > /conf.txt
USER daemon
RUN true
`

const onlyStageFile = `FROM REGISTRY/library/base:latest
COPY src /src
RUN echo NAME
USER daemon
RUN true
`

// onlyStage gives p a Dockerfile of one stage, whose steps show no stage.
func (p *project) onlyStage() {
	p.write("Dockerfile", strings.NewReplacer("REGISTRY", p.reg.host, "NAME", p.name).Replace(onlyStageFile))
}

// newProject is one whose steps no other has.
func newProject(t testing.TB, d *daemon, reg *registry, name string) *project {
	p := &project{t: t, d: d, reg: reg, dir: t.TempDir(), name: strings.ReplaceAll(name, " ", "-"), opts: map[string]string{}}
	p.write("Dockerfile", strings.NewReplacer("REGISTRY", reg.host, "NAME", p.name).Replace(projectFile))
	for _, f := range []string{"go.mod", "src/main.go", "src/old.go", "src/run.sh", "src/a/b/c.txt", "conf/app.conf", "unused.txt"} {
		p.write(f, f+" of "+p.name)
	}
	must(t, os.Symlink("main.go", p.path("src/link")))
	return p
}

func (p *project) path(name string) string { return filepath.Join(p.dir, name) }

func (p *project) write(name, content string) {
	p.t.Helper()
	must(p.t, os.MkdirAll(filepath.Dir(p.path(name)), 0o755))
	must(p.t, os.WriteFile(p.path(name), []byte(content), 0o644))
}

// edit replaces text in the Dockerfile.
func (p *project) edit(old, new string) {
	p.t.Helper()
	data, err := os.ReadFile(p.path("Dockerfile"))
	must(p.t, err)
	if strings.Count(string(data), old) != 1 {
		p.t.Fatalf("%q is not once in the Dockerfile", old)
	}
	p.write("Dockerfile", strings.Replace(string(data), old, new, 1))
}

// build builds the project and returns the explanation.
func (p *project) build() *explanation.Build {
	p.t.Helper()
	opts := client.SolveOptions{
		Ref: fmt.Sprintf("%s-%d", p.name, time.Now().UnixNano()), Frontend: "dockerfile.v0", Attrs: p.opts,
		Locals: map[string]string{"context": p.dir, "dockerfile": p.dir},
	}
	if !p.anon {
		opts.SharedKey = p.dir
	}
	c, err := client.New(p.d.addr, client.Options{})
	must(p.t, err)
	defer c.Close()
	p.logs = nil
	_, err = c.Solve(p.t.Context(), opts, func(msg *control.StatusResponse) {
		for _, l := range msg.Logs {
			p.logs = append(p.logs, l.Msg...)
		}
	})
	if (err != nil) != p.fail {
		p.t.Fatalf("build: %v", err)
	}
	if p.quiet {
		return nil
	}
	b, err := c.Explain(p.t.Context(), opts.Ref)
	must(p.t, err)
	if b.Ref != opts.Ref || b.Failed != p.fail {
		p.t.Fatalf("asked for %s, got %s, failed %v", opts.Ref, b.Ref, b.Failed)
	}
	return b
}

func asText(t testing.TB, b *explanation.Build) string {
	t.Helper()
	var s strings.Builder
	must(t, b.Write(&s, true, b.Ended))
	return s.String()
}

// cause is what a test expects: the kind, and parts of what Subject and To say.
type cause struct {
	kind    explanation.Kind
	subject string
	to      string
}

func (c cause) is(got explanation.Cause) bool {
	subject := got.Subject == c.subject || got.Kind == explanation.Image && strings.HasSuffix(got.Subject, c.subject)
	return got.Kind == c.kind && subject && strings.Contains(got.To, c.to)
}

// mutation changes one thing between two builds.
type mutation struct {
	name   string
	before func(p *project) // the first build
	change func(p *project)
	step   string // in which the cause must be named: a part of its name
	cause  cause  // and it must be certain, unless
	unsure bool   // it is only probable
	also   []cause
}

func file(path, how string) cause { return cause{explanation.File, path, how} }

const (
	copySrc = "COPY src ./src"
	runEcho = "RUN echo"
	mounts  = "RUN --mount=type=bind"
	last    = "RUN true"
)

var mutations = []mutation{
	// What the steps read.
	{name: "file changed", change: func(p *project) { p.write("src/main.go", "x") }, step: copySrc, cause: file("src/main.go", "changed")},
	{name: "file added", change: func(p *project) { p.write("src/new.go", "x") }, step: copySrc, cause: file("src/new.go", "added")},
	{name: "file removed", change: func(p *project) { must(p.t, os.Remove(p.path("src/old.go"))) }, step: copySrc, cause: file("src/old.go", "removed")},
	{name: "file renamed", change: func(p *project) { must(p.t, os.Rename(p.path("src/old.go"), p.path("src/moved.go"))) }, step: copySrc,
		cause: file("src/moved.go", "added"), also: []cause{file("src/old.go", "removed")}},
	{name: "deep file changed", change: func(p *project) { p.write("src/a/b/c.txt", "x") }, step: copySrc, cause: file("src/a/b/c.txt", "changed")},
	{name: "file mode", change: func(p *project) { must(p.t, os.Chmod(p.path("src/run.sh"), 0o755)) }, step: copySrc, cause: file("src/run.sh", "changed")},
	{name: "file became link", change: func(p *project) {
		must(p.t, os.Remove(p.path("src/old.go")))
		must(p.t, os.Symlink("main.go", p.path("src/old.go")))
	}, step: copySrc, cause: file("src/old.go", "changed")},
	{name: "link target", change: func(p *project) {
		must(p.t, os.Remove(p.path("src/link")))
		must(p.t, os.Symlink("old.go", p.path("src/link")))
	}, step: copySrc, cause: file("src/link", "changed")},
	{name: "directory mode", change: func(p *project) { must(p.t, os.Chmod(p.path("src/a"), 0o700)) }, step: copySrc, cause: file("src/a", "changed")},
	{name: "empty directory added", change: func(p *project) { must(p.t, os.Mkdir(p.path("src/empty"), 0o755)) }, step: copySrc, cause: file("src/empty", "added")},
	{name: "directory removed", change: func(p *project) { must(p.t, os.RemoveAll(p.path("src/a"))) }, step: copySrc,
		cause: file("src/a", "removed"), also: []cause{file("src/a/b", "removed"), file("src/a/b/c.txt", "removed"), {explanation.Files, "", ""}, {explanation.Files, ".", ""}}},
	{name: "single file copied", change: func(p *project) { p.write("go.mod", "x") }, step: "COPY --chown=1:1 go.mod", cause: file("go.mod", "changed")},
	{name: "bind mount", change: func(p *project) { p.write("conf/app.conf", "x") }, step: mounts, cause: file("conf/app.conf", "changed")},
	{name: "no longer ignored", before: func(p *project) { p.write(".dockerignore", "src/old.go") },
		change: func(p *project) { p.write(".dockerignore", "# nothing") }, step: copySrc, cause: file("src/old.go", "added")},
	{name: "newly ignored", change: func(p *project) { p.write(".dockerignore", "src/old.go") }, step: copySrc, cause: file("src/old.go", "removed")},
	{name: "one of many files", before: func(p *project) {
		for i := range 1500 {
			p.write(fmt.Sprintf("src/many/%d/%d", i%50, i), fmt.Sprint(i))
		}
	}, change: func(p *project) { p.write("src/many/7/1457", "x") }, step: copySrc, cause: file("src/many/7/1457", "changed")},
	{name: "many files", before: func(p *project) {
		for i := range 200 {
			p.write(fmt.Sprintf("src/many/%d", i), fmt.Sprint(i))
		}
	}, change: func(p *project) {
		for i := range 200 {
			p.write(fmt.Sprintf("src/many/%d", i), "x")
		}
	}, step: copySrc, cause: cause{explanation.Files, "", ""}},
	{name: "file of a stage", change: func(p *project) { p.edit("$VERSION $MODE", "$VERSION again $MODE") }, step: "COPY --from=build",
		cause: file("out.txt", "changed"), also: []cause{{explanation.Command, "", ""}}},

	// What the steps say.
	{name: "command", change: func(p *project) { p.edit("$VERSION $MODE", "$VERSION and $MODE") }, step: runEcho, cause: cause{explanation.Command, "", ""}},
	{name: "variable changed", change: func(p *project) { p.edit("MODE=fast", "MODE=slow") }, step: runEcho, cause: cause{explanation.Env, "MODE", ""}},
	{name: "variable added", change: func(p *project) { p.edit("LEVEL=1", "LEVEL=1 MORE=2") }, step: runEcho, cause: cause{explanation.Env, "MORE", ""}},
	{name: "variable removed", change: func(p *project) { p.edit(" LEVEL=1", "") }, step: runEcho, cause: cause{explanation.Env, "LEVEL", ""}},
	{name: "variables in another order", change: func(p *project) { p.edit("MODE=fast LEVEL=1", "LEVEL=1 MODE=fast") }, step: runEcho,
		cause: cause{explanation.Definition, "order of the environment", ""}},
	{name: "build argument", change: func(p *project) { p.opts["build-arg:VERSION"] = "2.0" }, step: runEcho, cause: cause{explanation.Argument, "VERSION", ""}},
	{name: "build argument left out", before: func(p *project) { p.opts["build-arg:VERSION"] = "2.0" },
		change: func(p *project) { delete(p.opts, "build-arg:VERSION") }, step: runEcho, cause: cause{explanation.Argument, "VERSION", ""}},
	{name: "default of an argument", change: func(p *project) { p.edit("VERSION=1.0", "VERSION=1.1") }, step: runEcho, cause: cause{explanation.Env, "VERSION", ""}},
	{name: "working directory", change: func(p *project) { p.edit("WORKDIR /", "WORKDIR /app/") }, step: "WORKDIR /app",
		cause: cause{explanation.Definition, "destination", "/app"}, also: []cause{{explanation.Definition, "destination", ""}, {explanation.Definition, "working directory", "/app"}}},
	{name: "user", change: func(p *project) { p.edit("USER daemon", "USER nobody") }, step: last, cause: cause{explanation.Definition, "user", "nobody"}},
	{name: "destination", change: func(p *project) { p.edit("src ./src", "src ./source") }, step: "COPY src ./source", cause: cause{explanation.Definition, "destination", "source"}},
	{name: "source", before: func(p *project) { p.write("go.other", "x") }, change: func(p *project) { p.edit("go.mod ./", "go.other ./") }, step: "go.other",
		cause: cause{explanation.Definition, "source", "go.other"}, also: []cause{file("go.other", "added"), file("go.mod", "removed"), {explanation.Files, ".", ""}}},
	{name: "owner", change: func(p *project) { p.edit("--chown=1:1", "--chown=2:2") }, step: "COPY --chown=2:2", cause: cause{explanation.Definition, "owner", "2:2"}},
	{name: "mode", change: func(p *project) { p.edit("--chown=1:1", "--chown=1:1 --chmod=600") }, step: "COPY --chown", cause: cause{explanation.Definition, "mode", "0600"}},
	{name: "COPY became ADD", change: func(p *project) { p.edit("COPY src", "ADD src") }, step: "ADD src", cause: cause{explanation.Definition, "unpacking", "on"}},
	{name: "network", change: func(p *project) { p.edit("RUN true", "RUN --network=none true") }, step: "RUN --network=none true", cause: cause{explanation.Definition, "network", "none"}},
	{name: "cache mount", change: func(p *project) { p.edit("RUN true", "RUN --mount=type=cache,target=/c true") }, step: "target=/c", cause: cause{explanation.Definition, "mount /c", "cache"}},
	{name: "cache mount shared otherwise", before: func(p *project) { p.edit("RUN true", "RUN --mount=type=cache,target=/c true") },
		change: func(p *project) { p.edit("target=/c true", "target=/c,sharing=locked true") }, step: "target=/c", cause: cause{explanation.Definition, "mount /c", "sharing of its own"}},
	{name: "secret", change: func(p *project) { p.edit("RUN true", "RUN --mount=type=secret,id=s,env=TOKEN true") }, step: "id=s", cause: cause{explanation.Definition, "secret variable TOKEN", "s"}},
	{name: "shell", change: func(p *project) { p.edit("USER daemon", "SHELL [\"/bin/busybox\", \"sh\", \"-c\"]\nUSER daemon") }, step: last, cause: cause{explanation.Command, "", ""}},
	{name: "extra host", change: func(p *project) { p.opts["add-hosts"] = "db=10.0.0.1" }, step: runEcho, cause: cause{explanation.Definition, "extra host db", ""}},
	{name: "ulimit", change: func(p *project) { p.opts["ulimit"] = "nofile=100:200" }, step: runEcho, cause: cause{explanation.Definition, "ulimit nofile", "100:200"}},
	{name: "shared memory", change: func(p *project) { p.opts["shm-size"] = "1048576" }, step: runEcho, cause: cause{explanation.Definition, "mount /dev/shm", "1048576"}},
	{name: "hostname", change: func(p *project) { p.opts["build-arg:BUILDKIT_SANDBOX_HOSTNAME"] = "box" }, step: runEcho, cause: cause{explanation.Definition, "hostname", "box"}},
	{name: "inline file", before: func(p *project) { p.edit("USER daemon", "COPY <<EOT /inline\nhello NAME\nEOT\nUSER daemon") },
		change: func(p *project) { p.edit("hello NAME", "goodbye NAME") }, step: "COPY <<EOT", cause: cause{explanation.Definition, "here-document EOT in the Dockerfile", ""}},

	{name: "first mount of the only stage", before: (*project).onlyStage,
		change: func(p *project) { p.edit("RUN true", "RUN --mount=type=cache,target=/c true") }, step: "target=/c", cause: cause{explanation.Definition, "mount /c", "cache"}, unsure: true},
	{name: "last mount of the only stage", before: func(p *project) {
		p.onlyStage()
		p.edit("RUN true", "RUN --mount=type=cache,target=/c true")
	}, change: func(p *project) { p.edit("--mount=type=cache,target=/c ", "") }, step: "RUN true", cause: cause{explanation.Definition, "mount /c", ""}, unsure: true},

	// Which steps there are.
	{name: "instruction inserted", change: func(p *project) { p.edit("COPY src", "RUN mkdir /added\nCOPY src") }, step: copySrc,
		cause: cause{explanation.Order, "[build 4/6] RUN mkdir /added", ""}, also: []cause{{explanation.New, "", ""}}},
	{name: "instruction removed", before: func(p *project) { p.edit("COPY src", "RUN mkdir /added\nCOPY src") },
		change: func(p *project) { p.edit("RUN mkdir /added\n", "") }, step: copySrc, cause: cause{explanation.Order, "[build 3/5] COPY --chown=1:1 go.mod ./", ""}},
	{name: "stage renamed, command edited", change: func(p *project) {
		p.edit("AS build", "AS builder")
		p.edit("--from=build", "--from=builder")
		p.edit("LEVEL=1", "LEVEL=2")
	}, step: runEcho, cause: cause{explanation.Env, "LEVEL", ""}},

	// What they stand on.
	{name: "base image moved", change: func(p *project) { p.reg.tag(p.t, "latest", p.name) }, step: "WORKDIR /",
		cause: cause{explanation.Image, "/library/base:latest", "sha256:"}, also: []cause{{explanation.Env, "BASE", ""}}},
	{name: "other base image", before: func(p *project) { p.reg.tag(p.t, "other", "other") },
		change: func(p *project) { p.edit("base:latest", "base:other") }, step: "WORKDIR /", cause: cause{explanation.Image, "", "base:other"},
		also: []cause{{explanation.Env, "BASE", ""}, {explanation.Image, "", ""}}},

	// Why the cache was of no use.
	{name: "no cache", change: func(p *project) { p.opts["no-cache"] = "" }, step: runEcho, cause: cause{explanation.NoCache, "--no-cache", ""}},
	{name: "no cache for a stage", change: func(p *project) { p.opts["no-cache"] = "build" }, step: runEcho, cause: cause{explanation.NoCache, "--no-cache-filter=build", ""}},
	{name: "cache pruned", change: func(p *project) {
		must(p.t, p.d.client().Prune(p.t.Context(), client.PruneOptions{All: true}, func(*control.UsageRecord) error { return nil }))
	}, step: runEcho, cause: cause{explanation.Evicted, "prune", ""}},
	{name: "failed before", before: func(p *project) {
		p.edit("RUN true", "RUN false")
		p.fail = true
	}, change: func(p *project) {}, step: "RUN false", cause: cause{explanation.FailedBefore, "", ""}},
}

// One thing changes between two builds: the explanation of the second names it,
// as certain, and nothing else as certain.
func TestSingleMutations(t *testing.T) {
	d, reg := newDaemon(t, time.Hour), newRegistry(t)
	if len(mutations) < 40 {
		t.Errorf("only %d mutations are tried", len(mutations))
	}
	for _, m := range mutations {
		t.Run(m.name, func(t *testing.T) {
			reg.tag(t, "latest", "base")
			p := newProject(t, d, reg, m.name)
			if m.before != nil {
				m.before(p)
			}
			p.build()
			m.change(p)
			b := p.build()
			m.check(t, b)
			if t.Failed() {
				t.Log(asText(t, b))
			}
		})
	}
}

func (m mutation) check(t *testing.T, b *explanation.Build) {
	t.Helper()
	i := slices.IndexFunc(b.Steps, func(s explanation.Step) bool { return s.Ran && strings.Contains(s.Name, m.step) })
	if i < 0 {
		t.Fatalf("no step %q ran", m.step)
	}
	if !slices.ContainsFunc(b.Steps[i].Causes, func(c explanation.Cause) bool { return m.cause.is(c) && c.Certain == !m.unsure }) {
		t.Errorf("%s %s; want %+v", b.Steps[i].Name, b.Steps[i].Sentence(), m.cause)
	}
	for _, s := range b.Steps {
		if s.Ran != (len(s.Causes) > 0) {
			t.Errorf("%s: ran %v, %d causes", s.Name, s.Ran, len(s.Causes))
		}
		for _, c := range s.Causes {
			root := c.Root()
			for _, c := range []explanation.Cause{c, root} {
				if c.Certain && c.Kind != explanation.Parent && c.Kind != explanation.Always && !m.explains(c) {
					t.Errorf("%s %s: that is wrong, and said to be certain", s.Name, c)
				}
			}
		}
	}
}

// explains reports whether c may be named: it is the cause, or what comes of it.
func (m mutation) explains(c explanation.Cause) bool {
	if m.cause.is(c) {
		return true
	}
	// The output of the first stage is read by the second.
	return file("out.txt", "changed").is(c) || slices.ContainsFunc(m.also, func(a cause) bool { return a.is(c) })
}

func TestExplainAsksForBuildsThatThereAre(t *testing.T) {
	d := newDaemon(t, time.Hour)
	_, err := d.client().Explain(t.Context(), "")
	wantCode(t, err, codes.NotFound, "no build has ended yet")
	_, err = d.client().Explain(t.Context(), "nope")
	wantCode(t, err, codes.NotFound, `"nope"`)
}
