//go:build linux && (amd64 || arm64)

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/kilnbuild/kiln/executor/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// kilnrun builds the command once for all tests.
var kilnrun = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "kilnrun")
	if err != nil {
		return "", err
	}
	built = dir
	out, err := exec.Command("go", "build", "-o", dir+"/kilnrun", ".").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return dir + "/kilnrun", nil
})

var built string // directory of what kilnrun built

func TestMain(m *testing.M) {
	code := m.Run()
	if built != "" {
		if err := os.RemoveAll(built); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// runtimes are the binaries to compare.
func runtimes(t *testing.T) map[string]string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test needs root: it runs containers")
	}
	runc, err := exec.LookPath("runc")
	if err != nil {
		t.Fatalf("this test needs runc: %v", err)
	}
	ours, err := kilnrun()
	if err != nil {
		t.Fatal(err)
	}
	return map[string]string{"kilnrun": ours, "runc": runc}
}

// newBundle makes a bundle with busybox in a directory, and its spec.
func newBundle(t *testing.T, script string) (dir string, spec *specs.Spec) {
	t.Helper()
	dir = t.TempDir()
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("this test needs a static busybox: %v", err)
	}
	bin := filepath.Join(dir, "rootfs/bin")
	if err := errors.Join(os.MkdirAll(bin, 0o755), os.WriteFile(filepath.Join(bin, "busybox"), busybox, 0o755)); err != nil {
		t.Fatal(err)
	}
	for _, applet := range strings.Fields("sh cat id env hostname sort ls stat sed kill grep umask ip pwd echo sleep touch mknod") {
		if err := os.Symlink("busybox", filepath.Join(bin, applet)); err != nil {
			t.Fatal(err)
		}
	}
	spec = container.Example()
	spec.Version = "1.0.2"
	spec.Process.Terminal, spec.Root.Readonly = false, false
	spec.Process.Args = []string{"sh", "-c", script}
	spec.Process.Env = []string{"PATH=/bin"}
	return dir, spec
}

func writeBundle(t *testing.T, dir string, spec *specs.Spec) {
	t.Helper()
	b, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// result is what a user sees of a command.
type result struct {
	code           int
	stdout, stderr string
}

func invoke(t *testing.T, binary, root string, args ...string) result {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := exec.Command(binary, append([]string{"--root", root}, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}
