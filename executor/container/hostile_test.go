//go:build linux && (amd64 || arm64)

package container

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// A root that moves proc to where it isn't masked, or a mount to where a
// container could fake it, makes no container.
func TestHostileRoots(t *testing.T) {
	const linked, inside, covers = "the root has a symbolic link there", "nothing can be mounted below /proc", "it is the root itself"
	for name, tc := range map[string]struct{ link, to, at, want string }{
		"/proc to the root":  {"proc", "/", "", linked},
		"/proc elsewhere":    {"proc", "bin", "", linked},
		"/sys to /proc":      {"sys", "/proc", "", linked},
		"/dev to the root":   {"dev", "/", "", covers},
		"a mount to /proc":   {"x", "/proc/self", "/x/attr", inside},
		"a mount in /proc":   {"x", "/", "/proc/sys", inside},
		"a mount to /proc/1": {"x", "/proc/1", "/x", inside},
	} {
		dir, spec := newBundle(t, "echo ran")
		if err := os.Symlink(tc.to, filepath.Join(dir, "rootfs", tc.link)); err != nil {
			t.Fatal(err)
		}
		if tc.at != "" {
			spec.Mounts = append(spec.Mounts, specs.Mount{Destination: tc.at, Type: "bind", Source: t.TempDir(), Options: []string{"rbind"}})
		}
		if _, err := tryCreate(t, dir, spec); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: error %v", name, err)
		}
	}
}

// Links in a volume don't lead to what the runtime has open while it makes
// mount points below it.
func TestMountPointsStayInside(t *testing.T) {
	dir, spec := newBundle(t, "echo ran")
	volume, machine := t.TempDir(), t.TempDir()
	fd, err := unix.Open(machine, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(os.Symlink(fmt.Sprintf("/proc/self/fd/%d", fd), filepath.Join(volume, "d")), os.WriteFile(filepath.Join(dir, "f"), nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	bind := func(at, source string) specs.Mount {
		return specs.Mount{Destination: at, Type: "bind", Source: source, Options: []string{"rbind"}}
	}
	for _, last := range []specs.Mount{bind("/v/d/made", dir), bind("/v/d/made", filepath.Join(dir, "f")), {Destination: "/v/d/a/b", Type: "tmpfs", Source: "x"}} {
		s := *spec
		s.Mounts = append(append([]specs.Mount{}, spec.Mounts...), bind("/v", volume), last)
		if _, err := tryCreate(t, dir, &s); err == nil {
			t.Errorf("a container with a mount at %s is made", last.Destination)
		}
		if entries, err := os.ReadDir(machine); err != nil || len(entries) > 0 {
			t.Errorf("the machine's directory has %v (%v)", entries, err)
		}
	}
}

// What is shown in place of what is masked, and what processes without input
// read, isn't up to an image or a volume that /dev comes from.
func TestHostileNull(t *testing.T) {
	for name, tc := range map[string]struct {
		null   func(name string) error
		volume bool // is mounted at /dev; otherwise the image's is copied
		want   string
	}{
		"a link of the image":  {func(name string) error { return os.Symlink("/etc/theirs", name) }, false, "null: too many levels of symbolic links: it is a symbolic link"},
		"none in the image":    {func(string) error { return nil }, false, ""},
		"a link of the volume": {func(name string) error { return os.Symlink("/etc/theirs", name) }, true, "null: too many levels of symbolic links: it is a symbolic link"},
		"none in the volume":   {func(string) error { return nil }, true, "null: no such file or directory: masked paths are covered with it"},
	} {
		t.Run(name, func(t *testing.T) {
			dir, spec := newBundle(t, "cat; cat /proc/keys; stat -c %t:%T /proc/keys")
			root := func(name string) string { return filepath.Join(dir, "rootfs", name) }
			dev, i := root("dev"), slices.IndexFunc(spec.Mounts, func(m specs.Mount) bool { return m.Destination == "/dev" })
			if tc.volume {
				dev = t.TempDir()
				spec.Mounts[i] = specs.Mount{Destination: "/dev", Type: "bind", Source: dev, Options: []string{"rbind"}}
			} else {
				spec.Mounts[i].Options = append(spec.Mounts[i].Options, "tmpcopyup")
			}
			if err := errors.Join(os.MkdirAll(dev, 0o755), os.MkdirAll(root("etc"), 0o755), os.WriteFile(root("etc/theirs"), []byte("theirs\n"), 0o644), tc.null(filepath.Join(dev, "null"))); err != nil {
				t.Fatal(err)
			}
			b, err := tryCreate(t, dir, spec)
			if tc.want != "" {
				if err == nil || !strings.Contains(err.Error(), tc.want) {
					t.Errorf("error %v, want %q", err, tc.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			b.start()
			if code, out := b.end(); code != 0 || out != "1:3\n" {
				t.Errorf("exit code %d, output %q", code, out)
			}
		})
	}
}
