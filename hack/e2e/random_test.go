//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Random projects, changed a bit between builds, make the same images with kiln as
// with upstream, or fail with both. Upstream only builds; kiln is killed, pruned,
// asked by two clients at once, and imports a cache that it has exported.
// KILN_RANDOM_PROJECTS is how many projects, a few here; a name is a seed, so that
// one can be looked at again.
func TestRandomProjects(t *testing.T) {
	n := 6
	if s := os.Getenv("KILN_RANDOM_PROJECTS"); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil || n < 1 {
			t.Fatalf("KILN_RANDOM_PROJECTS is %q, not a number of projects", s)
		}
	}
	for seed := range n {
		t.Run(strconv.Itoa(seed), func(t *testing.T) { buildRandomProject(t, uint64(seed)) })
	}
}

func buildRandomProject(t *testing.T, seed uint64) {
	d := newDaemon(t)
	peer := peerDaemon(t)
	p := newProject(t, seed)
	cache := filepath.Join(t.TempDir(), "cache")
	made := 0
	for range 6 {
		dockerfile := p.write()
		args := []string{"--opt", "target=" + p.anyStage().name}
		d.disturb(p, args)
		if _, err := os.Stat(filepath.Join(cache, "index.json")); err == nil && p.once(3) {
			d.buildctl("prune", "--all").must(t)
			args = append(args, "--import-cache", "type=local,src="+cache)
		} else if p.once(3) {
			args = append(args, "--export-cache", "type=local,mode=max,dest="+cache)
		}
		var wg sync.WaitGroup
		if p.once(3) {
			other := "target=" + p.anyStage().name
			wg.Go(func() { d.dockerfileIn(p.dir, "--opt", other) }) // it fails where its stage does
		}
		ours, ourErr := p.build(d.addr, args)
		wg.Wait()
		theirs, theirErr := p.build(peer, args[:2])
		switch {
		case (ourErr == "") != (theirErr == ""):
			t.Fatalf("one build fails\nkiln:     %s\nupstream: %s\n%q of\n%s", ourErr, theirErr, args, dockerfile)
		case !maps.Equal(ours, theirs):
			wantSame(t, ours, theirs)
			t.Fatalf("%q of\n%s", args, dockerfile)
		case ourErr == "":
			made++
		}
		p.change()
	}
	t.Logf("%d of 6 builds made an image", made)
}

// disturb does to the daemon what mustn't matter to the next build.
func (d *daemon) disturb(p *project, args []string) {
	d.t.Helper()
	switch p.IntN(8) {
	case 0:
		d.kill()
		d.start()
	case 1: // in the middle of a build
		kill := make(chan struct{})
		at := time.AfterFunc(time.Duration(p.IntN(700))*time.Millisecond, func() { close(kill) })
		cmd := d.client(filepath.Join(env.peer, "buildctl"), append(p.command(), args...)...)
		if err := cmd.Start(); err != nil {
			d.t.Fatal(err)
		}
		<-kill
		at.Stop()
		d.kill()
		cmd.Wait() // it may have been done
		d.start()
	case 2:
		d.buildctl("prune", "--filter", "type=="+p.pick("source.local", "regular")).must(d.t)
	}
}

// project is a context and a Dockerfile.
type project struct {
	*rand.Rand
	t      *testing.T
	dir    string
	stages []*randomStage
}

type randomStage struct {
	name, from string
	steps      []string
}

func newProject(t *testing.T, seed uint64) *project {
	p := &project{Rand: rand.New(rand.NewPCG(seed, 0)), t: t, dir: t.TempDir()}
	p.must(os.WriteFile(filepath.Join(p.dir, "a.tar"), []byte(smallArchive(t, "t\n", time.Unix(1e9, 0))), 0o644))
	for range 3 + p.IntN(4) {
		p.must(os.MkdirAll(p.path(p.pick("", "d1", "d2", "src"), p.pick("d1", "d2", "src", "lib")), 0o755))
	}
	for range 5 + p.IntN(9) {
		p.addFile()
	}
	for i := range 1 + p.IntN(4) {
		s := &randomStage{name: fmt.Sprint("s", i), from: "made"}
		if i > 0 && p.once(3) {
			s.from = p.anyStage().name
		}
		for range 1 + p.IntN(5) {
			s.steps = append(s.steps, p.step(i))
		}
		p.stages = append(p.stages, s)
	}
	return p
}

func (p *project) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *project) pick(of ...string) string { return of[p.IntN(len(of))] }
func (p *project) once(in int) bool         { return p.IntN(in) == 0 }
func (p *project) anyStage() *randomStage   { return p.stages[p.IntN(len(p.stages))] }
func (p *project) path(elem ...string) string {
	return filepath.Join(append([]string{p.dir}, elem...)...)
}

// paths are those of the context, relative to it.
func (p *project) paths(want func(os.FileMode) bool) (list []string) {
	p.t.Helper()
	p.must(filepath.WalkDir(p.dir, func(name string, e os.DirEntry, err error) error {
		rel := strings.TrimPrefix(name, p.dir+"/")
		if err == nil && name != p.dir && rel != "Dockerfile" && rel != "a.tar" && rel != ".dockerignore" && want(e.Type()) {
			list = append(list, rel)
		}
		return err
	}))
	return list
}

func anything(os.FileMode) bool { return true }

// somewhere is one of the context's paths, or what isn't there.
func (p *project) somewhere(want func(os.FileMode) bool) string {
	p.t.Helper()
	list := p.paths(want)
	if len(list) == 0 {
		return "missing"
	}
	return list[p.IntN(len(list))]
}

// addFile adds a file, a symbolic or a hard link, where nothing is.
func (p *project) addFile() {
	p.t.Helper()
	dirs := append(p.paths(os.FileMode.IsDir), "")
	name := p.path(dirs[p.IntN(len(dirs))], p.pick("a", "b", "c", "e.txt", "f.txt", "g.md", "sp ace", ".h"))
	if _, err := os.Lstat(name); err == nil {
		return
	}
	switch target := p.somewhere(anything); p.IntN(8) {
	default:
		p.writeFile(name)
		p.must(os.Chmod(name, []os.FileMode{0o644, 0o755, 0o600, 0o755 | os.ModeSetuid}[p.IntN(4)]))
	case 0:
		rel, err := filepath.Rel(filepath.Dir(name), p.path(target))
		p.must(err)
		p.must(os.Symlink(p.pick(rel, "/"+target, "nowhere", ".."), name))
	case 1:
		if target = p.somewhere(os.FileMode.IsRegular); target != "missing" {
			p.must(os.Link(p.path(target), name))
		}
	}
}

func (p *project) writeFile(name string) {
	p.t.Helper()
	p.must(os.WriteFile(name, []byte(strings.Repeat(p.pick("p", "q", "r", "s"), []int{0, 1, 10, 5000}[p.IntN(4)])), 0o644))
	// Of another size or not, its time tells that it was written.
	p.must(os.Chtimes(name, time.Time{}, time.Unix(1e9+int64(p.IntN(1e6)), 0)))
}

// change changes the context or the Dockerfile.
func (p *project) change() {
	p.t.Helper()
	if p.once(2) {
		i := p.IntN(len(p.stages))
		s := p.stages[i]
		switch at := p.IntN(len(s.steps)); {
		case p.once(3):
			s.steps[at] = p.step(i)
		case p.once(2) && len(s.steps) > 1:
			s.steps = slices.Delete(s.steps, at, at+1)
		default:
			s.steps = slices.Insert(s.steps, at, p.step(i))
		}
		return
	}
	some := p.path(p.somewhere(anything))
	switch file := p.somewhere(os.FileMode.IsRegular); p.IntN(6) {
	case 0:
		p.addFile()
	case 1:
		p.must(os.RemoveAll(some))
	case 2:
		err := os.Rename(some, p.path(p.somewhere(anything)))
		for _, refused := range []error{unix.ENOENT, unix.EINVAL, unix.EEXIST, unix.ENOTEMPTY, unix.ENOTDIR, unix.EISDIR} { // into itself, say
			if errors.Is(err, refused) {
				err = nil
			}
		}
		p.must(err)
	case 3:
		p.must(os.WriteFile(p.path(".dockerignore"), []byte(p.pick("*.md\n", "d1\n!d1/a\n", "**/a\n", "src\n!src/lib\n", "")), 0o644))
	default:
		if file == "missing" {
			p.addFile()
			return
		}
		p.writeFile(p.path(file))
		p.must(os.Chmod(p.path(file), []os.FileMode{0o644, 0o755, 0o600}[p.IntN(3)]))
	}
}

// step is one of a stage that may copy from those before it.
func (p *project) step(stage int) string {
	switch p.IntN(20) {
	case 0:
		return "WORKDIR " + p.pick("/o", "/w/x", "rel", "/")
	case 1:
		return p.pick("ENV", "ARG") + " V=" + p.pick("0", "1", "2")
	case 2:
		return "COPY <<EOF " + p.pick("/o/doc", "/q/doc", "/gen/doc") + "\nhello " + p.pick("0", "1") + " $V\nEOF"
	case 3, 4, 5, 6, 7, 8, 9:
		return p.run(stage)
	default:
		return p.copy(stage)
	}
}

func (p *project) copy(stage int) string {
	flags, sources := "", []string{p.source()}
	maybe := func(in int, flag string) {
		if p.once(in) {
			flags += flag + " "
		}
	}
	if from := p.IntN(stage + 2); from < stage {
		flags = fmt.Sprintf("--from=s%d ", from)
		sources = []string{p.pick("/o", "/o/", "/o/*", "/q", "/gen", "/gen/*", "/lnk", "/gen/r1", "/x", "/w", "/o/a")}
	} else if p.once(5) {
		sources = append(sources, p.source())
	}
	maybe(5, "--chown="+p.pick("1:2", "5", "0:7"))
	maybe(7, "--chmod="+p.pick("700", "0644", "u+x"))
	maybe(4, "--link")
	if maybe(8, "--parents"); strings.Contains(flags, "--from") && strings.Contains(flags, "--parents") {
		// A stage that copies what isn't there from its own base has nothing with
		// upstream, where any other COPY, and kiln, fail.
		sources = []string{p.pick("/o/*", "/gen/*")}
	}
	maybe(7, "--exclude="+p.pick("*.txt", "d1", "**/a", "src/*", "b*"))
	verb := "COPY "
	if !strings.Contains(flags, "--from") && !strings.Contains(flags, "--parents") && p.once(6) {
		if verb = "ADD "; p.once(2) {
			sources = []string{"a.tar"}
		}
	}
	to := p.pick("/", "/o/", "/o/p/", "/o/new", "/q", "/q/", "./", "x/", "/lnk/", "/o/p/d1/")
	if len(sources) > 1 && !strings.HasSuffix(to, "/") {
		to += "/"
	}
	return verb + flags + fmt.Sprintf("[%q", sources[0]) + strings.Join(quoted(append(sources[1:], to)), "") + "]"
}

func quoted(list []string) (out []string) {
	for _, s := range list {
		out = append(out, fmt.Sprintf(", %q", s))
	}
	return out
}

// source is what a COPY takes of the context.
func (p *project) source() string {
	name := p.somewhere(anything)
	dir, base := path.Split(name)
	return p.pick(name, name, name, ".", dir+base[:1]+"*", path.Clean(dir), dir+"*", "*/"+base)
}

func (p *project) run(stage int) string {
	if p.once(3) {
		mount := "--mount=type=bind,target=/mnt"
		if stage > 0 && p.once(2) {
			mount += fmt.Sprintf(",from=s%d", p.IntN(stage))
		}
		if p.once(2) {
			mount += ",rw"
		}
		return "RUN " + mount + " " + p.pick(
			"cd /mnt && find * -xdev | sort >/gen/list",
			"cp -a /mnt/o /gen/ 2>/dev/null; true",
			"cat /mnt/a /mnt/b /mnt/d1/* >/gen/cat 2>/dev/null; true",
			"cp /mnt/*.txt /gen/ 2>/dev/null; true",
			"touch /mnt/made 2>/dev/null; true",
		)
	}
	return "RUN " + p.pick("", "", "", "--mount=type=tmpfs,target=/o ") + p.pick(
		"mkdir -p /gen/r1; echo "+p.pick("0", "1", "2")+" >/gen/r1/f",
		"rm -rf /o",
		"rm -rf /gen; mkdir /gen",
		"ln -sfn o/p /lnk",
		"rm -f /lnk; ln -s /q /lnk",
		"find /o /q /gen /x -type f 2>/dev/null | sort >/w/list",
		"cat /o/* /q/* >/w/cat 2>/dev/null; true",
		"mv /o /o2 2>/dev/null; true",
		"rm -rf /q; mkdir /q; echo n >/q/n",
		"rm -f /o/a /o/*.txt",
		"chmod -R g+w /o 2>/dev/null; true",
		"chown -R 3:4 /q 2>/dev/null; true",
		"mkdir -p /gen; echo $V >/gen/v",
		"ln -f /o/a /o/hard 2>/dev/null; true",
		"rm -rf /o/p; mkdir -p /o; echo file >/o/p",
		"mkdir -p /o/p/d1/z 2>/dev/null; true",
		"rm -rf /o; mkdir -p /o; echo opaque >/o/opaque",
		"pwd >/cwd",
	)
}

// write writes the Dockerfile, and returns it.
func (p *project) write() string {
	p.t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "FROM %s AS made\nRUN mkdir -p o/p q gen/r1 w/x x/y; echo 1 >o/a; echo 2 >o/b.txt; echo 3 >o/p/c; echo 4 >q/n; echo 5 >gen/r1/f; "+
		"echo 6 >gen/a.txt; echo 7 >x/y/z; ln -s q lnk; ln o/a q/hard\n", env.base)
	for _, s := range p.stages {
		fmt.Fprintf(&b, "FROM %s AS %s\n%s\n", s.from, s.name, strings.Join(s.steps, "\n"))
	}
	p.must(os.WriteFile(p.path("Dockerfile"), []byte(b.String()), 0o644))
	return b.String()
}

// command is how buildctl builds it.
func (p *project) command() []string {
	return []string{"build", "--frontend", "dockerfile.v0", "--local", "context=" + p.dir, "--local", "dockerfile=" + p.dir}
}

// build returns the image's files and config, or why it failed.
func (p *project) build(addr string, args []string) (map[string]string, string) {
	p.t.Helper()
	out := filepath.Join(p.t.TempDir(), "image.tar")
	args = slices.Concat([]string{"--addr", addr}, p.command(), []string{"--progress=plain", "--output", "type=oci,dest=" + out}, args)
	if r := runCommand(p.t, exec.Command(filepath.Join(env.peer, "buildctl"), args...)); r.code != 0 {
		return nil, tail(r.stderr, 5)
	}
	l, _ := readArchive(p.t, out)
	files := flatten(p.t, l)
	files["the image's config"] = comparableConfig(p.t, l)
	return files, ""
}
