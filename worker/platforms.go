package worker

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tonistiigi/go-archvariant"
)

// native are the platforms that the machine's processor runs, best known first,
// and those that registered emulators add.
func native() []ocispec.Platform {
	host := platforms.Normalize(platforms.DefaultSpec())
	out := []ocispec.Platform{host}
	switch host.Architecture {
	case "amd64":
		for v := 2; v <= amd64Level(); v++ {
			p := host
			p.Variant = fmt.Sprintf("v%d", v)
			out = append(out, p)
		}
		out = append(out, ocispec.Platform{OS: host.OS, Architecture: "386"})
	case "arm64":
		out = append(out, ocispec.Platform{OS: host.OS, Architecture: "arm", Variant: "v7"},
			ocispec.Platform{OS: host.OS, Architecture: "arm", Variant: "v6"})
	}
	return append(out, emulated(host)...)
}

// amd64Level is the microarchitecture level of the processor, 1 to 4.
func amd64Level() int {
	level := 1
	if _, err := fmt.Sscanf(archvariant.AMD64Variant(), "v%d", &level); err != nil {
		return 1
	}
	return level
}

// emulators are the names that qemu registers with binfmt_misc, by architecture.
var emulators = map[string]string{
	"qemu-aarch64": "arm64", "qemu-arm": "arm", "qemu-x86_64": "amd64", "qemu-riscv64": "riscv64",
	"qemu-ppc64le": "ppc64le", "qemu-s390x": "s390x", "qemu-loongarch64": "loong64", "qemu-mips64el": "mips64le",
}

// emulated lists the platforms of enabled binfmt_misc handlers.
func emulated(host ocispec.Platform) []ocispec.Platform {
	handlers, err := filepath.Glob("/proc/sys/fs/binfmt_misc/qemu-*")
	if err != nil {
		return nil // the pattern is constant and well formed
	}
	var out []ocispec.Platform
	for _, h := range handlers {
		arch := emulators[filepath.Base(h)]
		data, err := os.ReadFile(h)
		if arch == "" || arch == host.Architecture || err != nil || !strings.HasPrefix(string(data), "enabled") {
			continue
		}
		out = append(out, platforms.Normalize(ocispec.Platform{OS: host.OS, Architecture: arch}))
	}
	return out
}
