package export

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tonistiigi/fsutil"
)

// failingDirs can't read one directory.
type failingDirs struct {
	fs.FS
	name string
}

func (f failingDirs) ReadDir(name string) ([]fs.DirEntry, error) {
	if name == f.name {
		return nil, errDiskGone
	}
	return fs.ReadDir(f.FS, name)
}

// A directory that can't be read isn't an empty one.
func TestWholeTree(t *testing.T) {
	dir := t.TempDir()
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "d"), 0o755), os.WriteFile(filepath.Join(dir, "d", "f"), nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"", ".", "d"} {
		root, err := os.OpenRoot(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		watched := watchRoot(root)
		watched.dirs.FS = failingDirs{watched.dirs.FS, bad}
		var seen []string
		err = wholeTree{fsutil.NewRootFS(watched), watched.dirs}.Walk(context.Background(), "", func(path string, _ fs.DirEntry, err error) error {
			seen = append(seen, path)
			return nil
		})
		if bad == "" && (err != nil || strings.Join(seen, " ") != "d d/f") || bad != "" && !errors.Is(err, errDiskGone) {
			t.Errorf("with a bad %q: saw %q, error %v", bad, seen, err)
		}
	}
}

// Names are what Linux takes: any bytes.
func TestNamesThatAreNoText(t *testing.T) {
	dir := t.TempDir()
	const name, link = "\xff\xfe\n", "l\xff"
	if err := errors.Join(os.Mkdir(filepath.Join(dir, name), 0o755), os.WriteFile(filepath.Join(dir, name, name), []byte("x"), 0o644),
		os.Symlink(name, filepath.Join(dir, link))); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	watched := watchRoot(root)
	var out bytes.Buffer
	if err := fsutil.WriteTar(t.Context(), wholeTree{fsutil.NewRootFS(watched), watched.dirs}, &out); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{name + "/": "", name + "/" + name: "x", link: ""}
	got := map[string]string{}
	for r := tar.NewReader(&out); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		got[h.Name] = string(data)
		if h.Name == link && h.Linkname != name {
			t.Errorf("the link leads to %q", h.Linkname)
		}
	}
	if !maps.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
