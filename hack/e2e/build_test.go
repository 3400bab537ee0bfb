//go:build e2e

package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// files are a context's content: paths to text. A path that ends with "/" is a
// directory, a text that starts with "->" a symlink.
type files map[string]string

// context writes f to a fresh directory.
func (f files) write(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range f {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		switch target, isLink := strings.CutPrefix(text, "->"); {
		case strings.HasSuffix(name, "/"):
			err = os.MkdirAll(path, 0o755)
		case isLink:
			err = os.Symlink(target, path)
		default:
			err = os.WriteFile(path, []byte(text), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// dockerfile builds a Dockerfile with ctx as its context; BASE in it stands for
// the busybox image. args are further flags of buildctl build.
func (d *daemon) dockerfile(dockerfile string, ctx files, args ...string) result {
	d.t.Helper()
	all := files{"Dockerfile": strings.ReplaceAll(dockerfile, "BASE", env.base)}
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], "BASEREF", env.base)
	}
	for name, text := range ctx {
		all[name] = text
	}
	return d.dockerfileIn(all.write(d.t), args...)
}

// dockerfileIn builds the Dockerfile in dir.
func (d *daemon) dockerfileIn(dir string, args ...string) result {
	d.t.Helper()
	return d.buildctl(append([]string{"build", "--frontend", "dockerfile.v0",
		"--local", "context=" + dir, "--local", "dockerfile=" + dir}, args...)...)
}

// local builds like dockerfile and returns the directory of the result's files.
func (d *daemon) local(dockerfile string, ctx files, args ...string) string {
	d.t.Helper()
	out := d.t.TempDir()
	d.dockerfile(dockerfile, ctx, append(args, "--output", "type=local,dest="+out)...).must(d.t)
	return out
}

// readFile returns the content of a file of a result.
func readFile(t *testing.T, elem ...string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(elem...))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestRunWritesFileThatIsExported(t *testing.T) {
	d := newDaemon(t)
	out := d.local("FROM BASE AS b\nRUN echo hello > /out.txt\nFROM scratch\nCOPY --from=b /out.txt /\n", nil)
	if got := readFile(t, out, "out.txt"); got != "hello\n" {
		t.Fatalf("out.txt = %q", got)
	}
}
