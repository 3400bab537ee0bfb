//go:build linux && (amd64 || arm64)

package executor

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// changes lists what a run left in the upper directory of its root.
func changes(t *testing.T, upper string) (list []string) {
	t.Helper()
	err := filepath.WalkDir(upper, func(p string, _ fs.DirEntry, err error) error {
		if p != upper {
			list = append(list, strings.TrimPrefix(p, upper))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// compat: LLB-026
func TestStubs(t *testing.T) {
	src := t.TempDir()
	if err := os.WriteFile(filepath.Join(src, "f"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	dir, file := func(dest string) Mount { return Mount{Dest: dest, Source: bindMount(src)} }, func(dest string) Mount {
		return Mount{Dest: dest, Source: bindMount(src), Selector: "f"}
	}
	// Every container keeps these, as with other builders.
	always := []string{"/dev", "/proc", "/sys"}
	eachRuntime(t, func(t *testing.T, e *executor) {
		for _, tc := range []struct {
			name      string
			script    string
			mounts    []Mount
			recursive bool
			noEtc     bool // the root has no /etc
			want      []string
		}{
			{name: "nothing of resolv.conf and hosts", want: []string{"/etc"}},
			{name: "directory and file", mounts: []Mount{dir("/mnt"), file("/file")}, want: []string{"/etc"}},
			{name: "parents stay", mounts: []Mount{dir("/a/b/c")}, want: []string{"/a", "/a/b", "/etc"}},
			{name: "parents go with recursive", mounts: []Mount{dir("/a/b/c"), file("/x/y")}, recursive: true, want: []string{"/etc"}},
			{name: "parents that are used stay", script: "echo > /a/file", mounts: []Mount{dir("/a/b/c")}, recursive: true, want: []string{"/a", "/a/file", "/etc"}},
			{name: "/etc stays where it was made", noEtc: true, want: []string{"/etc"}},
			{name: "/etc goes with recursive", noEtc: true, recursive: true},
			{name: "below another mount nothing is made in the root", mounts: []Mount{dir("/m"), file("/m/deep/file")}, want: []string{"/etc"}},
			{name: "what was there stays", mounts: []Mount{dir("/tmp")}, want: []string{"/etc"}},
			{name: "what the process makes stays", script: "echo x > /new", want: []string{"/etc", "/new"}},
		} {
			t.Run(tc.name, func(t *testing.T) {
				root := busyboxRoot(t)
				for _, d := range always {
					mkdir(t, filepath.Join(root, d))
				}
				if tc.noEtc {
					if err := os.RemoveAll(filepath.Join(root, "etc")); err != nil {
						t.Fatal(err)
					}
				}
				p := process(t, tc.script)
				var upper string
				p.Root, upper = overlay(t, root)
				p.Mounts, p.RemoveMountStubsRecursive = tc.mounts, tc.recursive
				output(t, e, p)
				if got := changes(t, upper); !slices.Equal(got, tc.want) {
					t.Errorf("the layer has %v, want %v", got, tc.want)
				}
			})
		}
	})
}

func TestStubsKeepTimes(t *testing.T) {
	eachRuntime(t, func(t *testing.T, e *executor) {
		root := busyboxRoot(t)
		old := time.Unix(1000000, 0)
		for _, d := range []string{"etc", "."} {
			if err := os.Chtimes(filepath.Join(root, d), old, old); err != nil {
				t.Fatal(err)
			}
		}
		p := process(t, "exit 0")
		p.Root, _ = overlay(t, root)
		p.Mounts = []Mount{{Dest: "/mnt", Source: bindMount(t.TempDir())}}
		output(t, e, p)
		p.ID, p.Args = newID(), []string{"stat", "-c", "%Y", "/etc"}
		p.Mounts = nil
		if out := output(t, e, p); out != "1000000\n" {
			t.Errorf("mtime of /etc is %s", out)
		}
	})
}

func TestRootKeepsStandardDirectories(t *testing.T) {
	eachRuntime(t, func(t *testing.T, e *executor) {
		p := process(t, "exit 0")
		var upper string
		p.Root, upper = overlay(t, busyboxRoot(t))
		output(t, e, p)
		if got := changes(t, upper); !slices.Equal(got, []string{"/dev", "/etc", "/proc", "/sys"}) {
			t.Errorf("the layer has %v", got)
		}
	})
}
