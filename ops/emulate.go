package ops

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/platforms"
	"github.com/kilnbuild/kiln/executor"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/cpu"
	"golang.org/x/sys/unix"
)

// binfmtDir is where the kernel lists its handlers of foreign programs.
const binfmtDir = "/proc/sys/fs/binfmt_misc"

// emulatorPath is where a step finds the emulator that its command is run with.
const emulatorPath = "/dev/.buildkit_qemu_emulator"

// machine is what marks the programs of an architecture, in the header of an
// ELF file, and what its emulator is called.
type machine struct {
	name  string
	elf   uint16 // e_machine
	bits  int
	large bool // big endian
}

var machines = map[string]machine{
	"386":      {"i386", 3, 32, false},
	"amd64":    {"x86_64", 62, 64, false},
	"arm":      {"arm", 40, 32, false},
	"arm64":    {"aarch64", 183, 64, false},
	"loong64":  {"loongarch64", 258, 64, false},
	"mips64":   {"mips64", 8, 64, true},
	"mips64le": {"mips64el", 8, 64, false},
	"ppc64le":  {"ppc64le", 21, 64, false},
	"riscv64":  {"riscv64", 243, 64, false},
	"s390x":    {"s390x", 22, 64, true},
}

// emulate makes sure that programs of the op's platform can run here: by
// themselves, by a handler that the kernel knows, or by an emulator found in
// PATH, which it mounts into the step (LLB-032).
func (s *mountSet) emulate() error {
	p := s.platform
	if p.OS != "linux" {
		return fmt.Errorf("run a process for %s: only linux is supported", platforms.Format(p))
	}
	if native(runtime.GOARCH, p) {
		return nil
	}
	if p.Architecture == runtime.GOARCH {
		return fmt.Errorf("run a process for %s: this machine's processor lacks instructions of that variant", platforms.Format(p))
	}
	m, known := machines[p.Architecture]
	if known && hasHandler(binfmtDir, m) {
		return nil
	}
	if !known {
		m.name = p.Architecture
	}
	helper, err := exec.LookPath("buildkit-qemu-" + m.name)
	if err != nil {
		return fmt.Errorf("run a process for %s on %s: the kernel has no handler for such programs in %s; install an emulator, for example with "+
			"\"docker run --privileged --rm tonistiigi/binfmt --install %s\", or put buildkit-qemu-%s into the daemon's PATH",
			platforms.Format(p), runtime.GOARCH, binfmtDir, p.Architecture, m.name)
	}
	if helper, err = filepath.EvalSymlinks(helper); err != nil {
		return fmt.Errorf("find emulator: %w", err)
	}
	s.emulator = []string{emulatorPath}
	s.mounts = append(s.mounts, executor.Mount{
		Dest:     emulatorPath,
		Source:   []mount.Mount{{Type: "bind", Source: filepath.Dir(helper), Options: []string{"rbind", "ro"}}},
		Selector: filepath.Base(helper),
		Readonly: true,
	})
	return nil
}

// native says whether a processor of architecture arch runs programs of p.
func native(arch string, p ocispec.Platform) bool {
	if arch == p.Architecture {
		return arch != "amd64" || p.Variant == "" || amd64Level() >= p.Variant
	}
	switch arch {
	case "amd64":
		return p.Architecture == "386"
	case "arm64":
		return p.Architecture == "arm" && runs32bit()
	}
	return false
}

// runs32bit asks an arm64 kernel whether the processor also runs arm programs:
// it refuses the personality of such programs if not.
func runs32bit() bool {
	const perLinux32 = 0x8
	runtime.LockOSThread() // a personality is a thread's own
	defer runtime.UnlockOSThread()
	before, _, errno := unix.RawSyscall(unix.SYS_PERSONALITY, perLinux32, 0, 0)
	if errno != 0 {
		return false
	}
	_, _, errno = unix.RawSyscall(unix.SYS_PERSONALITY, before, 0, 0)
	return errno == 0
}

// amd64Level is the newest variant of amd64 that this machine's processor has.
func amd64Level() string {
	x := cpu.X86
	switch {
	case !x.HasSSE3 || !x.HasSSSE3 || !x.HasSSE41 || !x.HasSSE42 || !x.HasPOPCNT:
		return "v1"
	case !x.HasAVX || !x.HasAVX2 || !x.HasBMI1 || !x.HasBMI2 || !x.HasFMA:
		return "v2"
	case !x.HasAVX512F || !x.HasAVX512BW || !x.HasAVX512CD || !x.HasAVX512DQ || !x.HasAVX512VL:
		return "v3"
	}
	return "v4"
}

// hasHandler says whether an enabled handler in dir takes programs of m. The
// handlers' names are anybody's choice; what counts is the header they match.
func hasHandler(dir string, m machine) bool {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return false // not mounted: no handlers
	}
	header := m.header()
	for _, e := range entries {
		if e.Name() == "register" || e.Name() == "status" {
			continue
		}
		dt, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err == nil && handlerMatches(dt, header) {
			return true
		}
	}
	return false
}

// header is the start of a program for m: an executable ELF file.
func (m machine) header() []byte {
	h := make([]byte, 20)
	copy(h, "\x7fELF\x02\x01\x01")
	if m.bits == 32 {
		h[4] = 1
	}
	put := func(at int, v uint16) { h[at], h[at+1] = byte(v), byte(v>>8) }
	if m.large {
		h[5] = 2
		put = func(at int, v uint16) { h[at], h[at+1] = byte(v>>8), byte(v) }
	}
	put(16, 2) // e_type: executable
	put(18, m.elf)
	return h
}

// handlerMatches parses a handler as the kernel shows it and compares its
// magic number with header.
func handlerMatches(handler, header []byte) bool {
	var enabled bool
	var magic, mask []byte
	lines := bufio.NewScanner(bytes.NewReader(handler))
	for lines.Scan() {
		key, value, _ := strings.Cut(lines.Text(), " ")
		switch key {
		case "enabled":
			enabled = true
		case "offset":
			if value != "0" {
				return false
			}
		case "magic":
			magic, _ = hex.DecodeString(value)
		case "mask":
			mask, _ = hex.DecodeString(value)
		}
	}
	if !enabled || len(magic) == 0 || len(magic) > len(header) {
		return false
	}
	for i, want := range magic {
		got := header[i]
		if i < len(mask) {
			got &= mask[i]
		}
		if got != want {
			return false
		}
	}
	return true
}
