//go:build linux && (amd64 || arm64)

package container

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Paths that are masked are looked at in the container: the machine doesn't
// have them.
func TestMasksOwnFiles(t *testing.T) {
	bundle, spec := newBundle(t, "cat /secret; ls /secrets; ls /kept")
	for _, name := range []string{"secrets/a", "secret", "kept/b"} {
		name = filepath.Join(bundle, "rootfs", name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte("text\n"), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	spec.Linux.MaskedPaths = append(spec.Linux.MaskedPaths, "/secret", "/secrets", "/nonexist", "/secret/below")
	b := createBox(t, bundle, spec)
	b.start()
	if code, out := b.end(); code != 0 || out != "b\n" {
		t.Errorf("exit code %d, output %q", code, out)
	}
}

// A tmpfs is as private as the directory that it covers, but not as one that
// is covered already.
func TestTmpfsMode(t *testing.T) {
	bundle, spec := newBundle(t, "stat -c %a /private /private/in /given /new")
	for _, name := range []string{"private/in", "given"} {
		if err := os.MkdirAll(filepath.Join(bundle, "rootfs", name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, m := range []specs.Mount{{Destination: "/private"}, {Destination: "/private/in"}, {Destination: "/given", Options: []string{"mode=711"}}, {Destination: "/new"}} {
		m.Type, m.Source = "tmpfs", "tmpfs"
		spec.Mounts = append(spec.Mounts, m)
	}
	b := createBox(t, bundle, spec)
	b.start()
	if code, out := b.end(); code != 0 || strings.Join(strings.Fields(out), " ") != "700 1777 711 1777" {
		t.Errorf("exit code %d, output %q", code, out)
	}
}

// Standard input and output belong to the process's user, but /dev/null stays
// the machine's root's.
func TestNullIsNotGivenAway(t *testing.T) {
	const name = "/dev/null"
	before := owner(t, name)
	bundle, spec := newBundle(t, "exit 0")
	spec.Process.User.UID = 64321 // nobody's but this test's
	b := createBox(t, bundle, spec)
	if uid := owner(t, b.out.Name()); uid != spec.Process.User.UID {
		t.Errorf("output belongs to %d", uid)
	}
	if after := owner(t, name); after == spec.Process.User.UID {
		t.Errorf("/dev/null belonged to %d and now to %d", before, after)
	}
}

func owner(t *testing.T, name string) uint32 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		t.Fatal(err)
	}
	return st.Uid
}

func TestLastValues(t *testing.T) {
	got := lastValues([]string{"A=1", "B=2", "A=3", "C", "B="})
	if want := []string{"A=3", "C", "B="}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

// What can't be done is refused before anything is made.
func TestCheck(t *testing.T) {
	for want, change := range map[string]func(*specs.Spec){
		"no new time namespace": func(s *specs.Spec) { s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"monotonic": {Secs: 1}} },
		`"realtime" is neither`: func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.TimeNamespace})
			s.Linux.TimeOffsets = map[string]specs.LinuxTimeOffset{"realtime": {Secs: 1}}
		},
		"linux.memoryPolicy": func(s *specs.Spec) { s.Linux.MemoryPolicy = &specs.LinuxMemoryPolicy{} },
		"linux.intelRdt":     func(s *specs.Spec) { s.Linux.IntelRdt = &specs.LinuxIntelRdt{} },
		"linux.netDevices":   func(s *specs.Spec) { s.Linux.NetDevices = map[string]specs.LinuxNetDevice{"eth0": {}} },
		"no user namespace":  func(s *specs.Spec) { s.Linux.UIDMappings = []specs.LinuxIDMapping{{Size: 1}} },
		"is there twice": func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.PIDNamespace})
		},
		`ociVersion "1.x"`:                     func(s *specs.Spec) { s.Version = "1.x" },
		`ociVersion "2.0.0"`:                   func(s *specs.Spec) { s.Version = "2.0.0" },
		"RLIMIT_NOFILE is there":               func(s *specs.Spec) { s.Process.Rlimits = append(s.Process.Rlimits, s.Process.Rlimits[0]) },
		"the soft limit, 2, is above the hard": func(s *specs.Spec) { s.Process.Rlimits[0].Soft, s.Process.Rlimits[0].Hard = 2, 1 },
		"4294967295 is no id":                  func(s *specs.Spec) { s.Process.User.AdditionalGids = []uint32{1<<32 - 1} },
		"process.oomScoreAdj 1001":             func(s *specs.Spec) { n := 1001; s.Process.OOMScoreAdj = &n },
		"a terminal has at most 65535":         func(s *specs.Spec) { s.Process.ConsoleSize = &specs.Box{Width: 1 << 16} },
		`linux.personality.domain "LINUX99"`:   func(s *specs.Spec) { s.Linux.Personality = &specs.LinuxPersonality{Domain: "LINUX99"} },
		`linux.maskedPaths: "x" must be`:       func(s *specs.Spec) { s.Linux.MaskedPaths = []string{"x"} },
		`linux.readonlyPaths: "x" must be`:     func(s *specs.Spec) { s.Linux.ReadonlyPaths = []string{"x"} },
		"number 8 (tmpfs x) has no":            func(s *specs.Spec) { s.Mounts = append(s.Mounts, specs.Mount{Type: "tmpfs", Source: "x"}) },
	} {
		s := Example()
		change(s)
		if err := check(s); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q in it", err, want)
		}
	}
}
