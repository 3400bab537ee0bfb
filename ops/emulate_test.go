package ops

import (
	"os"
	"path/filepath"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The handlers as the kernel shows them after tonistiigi/binfmt has registered
// them, cut to what is read.
const (
	aarch64Handler = "enabled\ninterpreter /usr/bin/buildkit-qemu-aarch64\nflags: POCF\noffset 0\n" +
		"magic 7f454c460201010000000000000000000200b700\nmask ffffffffffffff00fffffffffffffffffeffffff\n"
	s390xHandler = "enabled\ninterpreter /usr/bin/buildkit-qemu-s390x\nflags: POCF\noffset 0\n" +
		"magic 7f454c4602020100000000000000000000020016\nmask ffffffffffffff00fffffffffffffffffffeffff\n"
	armHandler = "enabled\ninterpreter /usr/bin/buildkit-qemu-arm\nflags: POCF\noffset 0\n" +
		"magic 7f454c4601010100000000000000000002002800\nmask ffffffffffffff00fffffffffffffffffeffffff\n"
	pythonHandler = "enabled\ninterpreter /usr/bin/python3\nflags: \noffset 0\nmagic cb0d0d0a\n"
)

// compat: LLB-032
func TestHasHandler(t *testing.T) {
	for _, c := range []struct {
		name, arch, handler string
		want                bool
	}{
		{"arm64", "arm64", aarch64Handler, true},
		{"big endian", "s390x", s390xHandler, true},
		{"32 bits", "arm", armHandler, true},
		{"another architecture", "riscv64", aarch64Handler, false},
		{"arm isn't arm64", "arm64", armHandler, false},
		{"something else", "arm64", pythonHandler, false},
		{"disabled", "arm64", "disabled" + aarch64Handler[len("enabled"):], false},
		{"by file name", "arm64", "enabled\ninterpreter /x\nflags: \nextension .arm\n", false},
		{"garbage", "arm64", "enabled\nmagic zz\nmask\n\n", false},
		{"empty", "arm64", "", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, text := range map[string]string{"register": "", "status": "enabled\n", "some-name": c.handler} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if got := hasHandler(dir, machines[c.arch]); got != c.want {
				t.Errorf("handler for %s: %v, want %v", c.arch, got, c.want)
			}
		})
	}
	if hasHandler(filepath.Join(t.TempDir(), "missing"), machines["arm64"]) {
		t.Error("a handler where binfmt_misc isn't mounted")
	}
}

func TestNative(t *testing.T) {
	for _, c := range []struct {
		host string
		p    ocispec.Platform
		want bool
	}{
		{"amd64", ocispec.Platform{Architecture: "amd64"}, true},
		{"amd64", ocispec.Platform{Architecture: "386"}, true},
		{"amd64", ocispec.Platform{Architecture: "amd64", Variant: "v9"}, false},
		{"amd64", ocispec.Platform{Architecture: "arm64"}, false},
		{"arm64", ocispec.Platform{Architecture: "arm64"}, true},
		{"arm64", ocispec.Platform{Architecture: "amd64"}, false},
		{"riscv64", ocispec.Platform{Architecture: "riscv64"}, true},
	} {
		if got := native(c.host, c.p); got != c.want {
			t.Errorf("native(%s, %s/%s) = %v, want %v", c.host, c.p.Architecture, c.p.Variant, got, c.want)
		}
	}
}
