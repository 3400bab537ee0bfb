//go:build e2e

package e2e

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// copyForms are steps that use some of a directory M of the context. What they make
// is named for M and the form, F: no two steps of the test are to have the same key.
var copyForms = map[string]string{
	"file":           "COPY M/f /M/F/",
	"dir":            "COPY M/sub /M/F/",
	"all":            "COPY M /M/F",
	"wildcard":       "COPY M/*.txt /M/F/",
	"wildcard-dir":   "COPY M/s*/a /M/F/",
	"exclude":        "COPY --exclude=**/b M/sub /M/F/",
	"exclude-dir":    "COPY --exclude=M/sub/deep M /M/F/",
	"parents":        "COPY --parents M/sub/deep/c /M/F/",
	"parents-many":   "COPY --parents M/*/a /M/F/",
	"parents-pivot":  "COPY --parents M/./sub /M/F/",
	"link-file":      "COPY --link M/f /M/F",
	"link-dir":       "COPY --link M/sub /M/F/",
	"chown":          "COPY --chown=1:2 M/sub /M/F/",
	"chmod-file":     "COPY --chmod=600 M/f /M/F",
	"several":        "COPY M/f M/g /M/F/",
	"symlink-file":   "COPY M/ln /M/F",
	"symlink-dir":    "COPY M/dl /M/F/",
	"through-link":   "COPY M/dl/a /M/F",
	"links-in-dir":   "COPY M/links /M/F/",
	"add-dir":        "ADD M/sub /M/F/",
	"add-archive":    "ADD M/t.tar /M/F/",
	"empty-dir":      "COPY M/empty /M/F/",
	"bind":           "RUN --mount=source=M/sub,target=/M true F",
	"from-stage":     "COPY --from=M.all /M/all/sub /M/F/",
	"from-stage-one": "COPY --from=M.all /M/all/sub/a /M/F/",
}

// contextMutations change a directory that mutationDir describes.
var contextMutations = map[string]func(c change){
	"nothing":            func(change) {},
	"content":            func(c change) { c.write("f", "another") },
	"content-same-size":  func(c change) { c.write("f", "F\n") },
	"content-swapped":    func(c change) { c.write("f", "g\n"); c.write("g", "f\n") },
	"content-in-dir":     func(c change) { c.write("sub/a", "another") },
	"content-excluded":   func(c change) { c.write("sub/b", "another") },
	"replaced-by-same":   func(c change) { c.remove("f"); c.write("f", "f\n") },
	"mode-file":          func(c change) { c.must(os.Chmod(c.path("f"), 0o755)) },
	"mode-file-in-dir":   func(c change) { c.must(os.Chmod(c.path("sub/a"), 0o600)) },
	"mode-dir":           func(c change) { c.must(os.Chmod(c.path("sub"), 0o700)) },
	"mode-dir-deep":      func(c change) { c.must(os.Chmod(c.path("sub/deep"), 0o700)) },
	"mode-dir-empty":     func(c change) { c.must(os.Chmod(c.path("empty"), 0o700)) },
	"mtime-file":         func(c change) { c.must(os.Chtimes(c.path("f"), time.Time{}, time.Unix(1e9, 0))) },
	"mtime-dir":          func(c change) { c.must(os.Chtimes(c.path("sub"), time.Time{}, time.Unix(1e9, 0))) },
	"owner":              func(c change) { c.must(os.Chown(c.path("f"), 5, 6)) },
	"add-in-dir":         func(c change) { c.write("sub/new", "new") },
	"add-matching":       func(c change) { c.write("new.txt", "new") },
	"add-outside":        func(c change) { c.write("other/new", "new") },
	"add-empty-dir":      func(c change) { c.must(os.Mkdir(c.path("sub/newdir"), 0o755)) },
	"remove-in-dir":      func(c change) { c.remove("links/target") },
	"remove-matching":    func(c change) { c.remove("two.txt") },
	"rename":             func(c change) { c.must(os.Rename(c.path("sub/deep/d"), c.path("sub/deep/e"))) },
	"rename-case":        func(c change) { c.must(os.Rename(c.path("sub/deep/d"), c.path("sub/deep/D"))) },
	"symlink-file":       func(c change) { c.remove("ln"); c.must(os.Symlink("g", c.path("ln"))) },
	"symlink-dir":        func(c change) { c.remove("dl"); c.must(os.Symlink("sub2", c.path("dl"))) },
	"symlink-in-dir":     func(c change) { c.remove("links/l"); c.must(os.Symlink("nowhere", c.path("links/l"))) },
	"file-to-dir":        func(c change) { c.remove("sub/b"); c.write("sub/b/x", "x") },
	"file-to-symlink":    func(c change) { c.remove("sub/b"); c.must(os.Symlink("a", c.path("sub/b"))) },
	"dir-to-symlink":     func(c change) { c.remove("sub/none"); c.must(os.Symlink("deep", c.path("sub/none"))) },
	"hard-link":          func(c change) { c.remove("sub/b"); c.must(os.Link(c.path("sub/a"), c.path("sub/b"))) },
	"xattr-file":         func(c change) { c.must(unix.Setxattr(c.path("f"), "user.kiln", []byte("v"), 0)) },
	"xattr-file-in-dir":  func(c change) { c.must(unix.Setxattr(c.path("sub/a"), "user.kiln", []byte("v"), 0)) },
	"xattr-dir":          func(c change) { c.must(unix.Setxattr(c.path("sub"), "user.kiln", []byte("v"), 0)) },
	"ignored-in-dir":     func(c change) { c.ignore("sub/b") },
	"ignored-matching":   func(c change) { c.ignore("*.txt", "!one.txt") },
	"archive-other-time": func(c change) { c.write("t.tar", smallArchive(c.t, "t\n", time.Unix(1e9, 0))) },
}

// mutationDir is what each mutation finds.
var mutationDir = files{
	"f": "f\n", "g": "g\n", "one.txt": "1\n", "two.txt": "2\n", "ln": "->f", "dl": "->sub",
	"sub/a": "same\n", "sub/b": "same\n", "sub/deep/c": "c\n", "sub/deep/d": "d\n", "sub/none/": "",
	"sub2/a": "a2\n", "other/z": "z\n", "empty/": "", "links/target": "t\n", "links/l": "->target",
}

// cachedDifferently is where kiln and upstream decide differently, and why: forms
// by mutation, each run by kiln and taken from the cache by upstream.
var cachedDifferently = map[string]struct {
	why   string
	forms []string
}{
	"mode-dir":          {directorySent, append([]string{"parents", "parents-many"}, wholeDir...)},
	"mode-dir-deep":     {directorySent, append([]string{"parents"}, wholeDir...)},
	"mode-dir-empty":    {directorySent, []string{"all", "empty-dir", "exclude-dir"}},
	"xattr-dir":         {xattrSent, append([]string{"parents", "parents-many"}, wholeDir...)},
	"xattr-file":        {xattrSent, []string{"all", "chmod-file", "exclude-dir", "file", "link-file", "several", "symlink-file"}},
	"xattr-file-in-dir": {xattrSent, append([]string{"from-stage-one", "parents-many", "through-link", "wildcard-dir"}, wholeDir...)},
}

const (
	directorySent = "upstream's transfer of the context doesn't send a directory again whose mode has changed, so that its step keeps what it had"
	xattrSent     = "upstream's transfer of the context doesn't send a file again of which only an extended attribute has changed, so that its step keeps what it had"
)

// wholeDir are the forms that use all of M/sub.
var wholeDir = []string{"add-dir", "all", "bind", "chown", "dir", "exclude", "exclude-dir", "from-stage", "link-dir", "parents-pivot", "symlink-dir"}

// change is a directory being mutated.
type change struct {
	t       *testing.T
	context string
	name    string
}

func (c change) path(name string) string { return filepath.Join(c.context, c.name, name) }
func (c change) remove(name string)      { c.must(os.RemoveAll(c.path(name))) }

func (c change) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c change) write(name, text string) {
	c.t.Helper()
	c.must(os.MkdirAll(filepath.Dir(c.path(name)), 0o755))
	c.must(os.WriteFile(c.path(name), []byte(text), 0o644))
}

// ignore adds patterns below the directory to the context's .dockerignore.
func (c change) ignore(patterns ...string) {
	c.t.Helper()
	f, err := os.OpenFile(filepath.Join(c.context, ".dockerignore"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	c.must(err)
	for _, p := range patterns {
		p, not := strings.CutPrefix(p, "!")
		line := c.name + "/" + p + "\n"
		if not {
			line = "!" + line
		}
		_, err = f.WriteString(line)
		c.must(err)
	}
	c.must(f.Close())
}

// smallArchive is a tar archive of one file.
func smallArchive(t *testing.T, text string, at time.Time) string {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	err := w.WriteHeader(&tar.Header{Name: "t", Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(text)), ModTime: at})
	if err == nil {
		_, err = w.Write([]byte(text))
	}
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return buf.String()
}

// Every form of COPY, ADD and bind mount is taken from the cache after the same
// changes of its context as by upstream. All is in two builds, before and after: a
// directory for each mutation, a stage for each form in it.
func TestSameCacheAsUpstream(t *testing.T) {
	d := newDaemon(t)
	peer := peerDaemon(t)
	ctx := t.TempDir()
	mutations := slices.Sorted(maps.Keys(contextMutations))
	for _, m := range mutations {
		dir := mutationDir.write(t)
		if err := os.WriteFile(filepath.Join(dir, "t.tar"), []byte(smallArchive(t, "t\n", time.Unix(2e9, 0))), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(dir, filepath.Join(ctx, m)); err != nil {
			t.Fatal(err)
		}
	}
	dockerfile := t.TempDir()
	if err := os.WriteFile(filepath.Join(dockerfile, "Dockerfile"), []byte(cacheStages(mutations)), 0o644); err != nil {
		t.Fatal(err)
	}
	build := func(addr string) result {
		return runCommand(t, exec.Command(filepath.Join(env.peer, "buildctl"), "--addr", addr, "build", "--progress=rawjson", "--frontend", "dockerfile.v0",
			"--local", "context="+ctx, "--local", "dockerfile="+dockerfile))
	}
	both := func() (map[string]string, map[string]string) {
		t.Helper()
		var ours, theirs result
		var wg sync.WaitGroup
		wg.Go(func() { ours = build(d.addr) })
		wg.Go(func() { theirs = build(peer) })
		wg.Wait()
		return decisions(t, ours.must(t).stderr), decisions(t, theirs.must(t).stderr)
	}
	both()
	for _, m := range mutations {
		contextMutations[m](change{t, ctx, m})
	}
	ours, theirs := both()

	known := map[string]string{}
	for m, k := range cachedDifferently {
		for _, form := range k.forms {
			known[m+"."+form] = k.why
		}
	}
	ran := 0
	for _, m := range mutations {
		for _, form := range slices.Sorted(maps.Keys(copyForms)) {
			step := m + "." + form
			a, b := ours[step], theirs[step]
			if a == "" || b == "" {
				t.Errorf("%s: kiln %q, upstream %q: a step is missing", step, a, b)
			}
			if a == "RAN" {
				ran++
			}
			switch why := known[step]; {
			case why == "" && a != b:
				t.Errorf("%s: kiln %s, upstream %s", step, a, b)
			case why != "" && (a != "RAN" || b != "CACHED"):
				t.Errorf("%s: kiln %s, upstream %s, though it is said to differ: %s", step, a, b, why)
			}
			delete(known, step)
		}
	}
	if len(known) > 0 {
		t.Errorf("differences that were not looked for: %q", slices.Sorted(maps.Keys(known)))
	}
	t.Logf("%d steps, of which kiln ran %d again", len(mutations)*len(copyForms), ran)
}

var wordM, wordF = regexp.MustCompile(`\bM\b`), regexp.MustCompile(`\bF\b`)

// cacheStages is a Dockerfile with a stage MUTATION.FORM for each of both. Those of
// a mutation end in one step that wants them all, and all of these in another.
func cacheStages(mutations []string) string {
	var df, last strings.Builder
	forms := slices.Sorted(maps.Keys(copyForms)) // "all" is before those that copy from it
	for _, m := range mutations {
		gather := ""
		for _, form := range forms {
			text := copyForms[form]
			from := "scratch"
			if strings.HasPrefix(text, "RUN") {
				from = env.base
			}
			text = wordM.ReplaceAllString(wordF.ReplaceAllString(text, form), m)
			fmt.Fprintf(&df, "FROM %s AS %s.%s\n%s\n", from, m, form, text)
			gather += fmt.Sprintf(" --mount=from=%s.%s,target=/m/%s", m, form, form)
		}
		fmt.Fprintf(&df, "FROM %s AS %s\nRUN%s true\n", env.base, m, gather)
		fmt.Fprintf(&last, " --mount=from=%s,target=/m/%s", m, m)
	}
	return df.String() + "FROM " + env.base + "\nRUN" + last.String() + " true\n"
}

// decisions is what became of the last step of each stage, by what a client was told.
func decisions(t *testing.T, rawjson string) map[string]string {
	t.Helper()
	type position struct{ step, of string }
	stageOf := regexp.MustCompile(`^\[(\S+\.\S+) +(\d+)/(\d+)\]`)
	out := map[string]string{}
	for dec := json.NewDecoder(strings.NewReader(rawjson)); ; {
		var status struct {
			Vertexes []struct {
				Name      string
				Cached    bool
				Completed *time.Time
			}
		}
		if err := dec.Decode(&status); errors.Is(err, io.EOF) {
			return out
		} else if err != nil {
			t.Fatalf("%v in the status of a build", err)
		}
		for _, v := range status.Vertexes {
			m := stageOf.FindStringSubmatch(v.Name)
			if m == nil || v.Completed == nil {
				continue
			}
			if at := (position{m[2], m[3]}); at.step != at.of {
				continue
			}
			out[m[1]] = "RAN"
			if v.Cached {
				out[m[1]] = "CACHED"
			}
		}
	}
}
