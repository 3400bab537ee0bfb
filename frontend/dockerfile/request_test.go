package dockerfile

import (
	"reflect"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/client/llb"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// compat: DF-021
// compat: DF-022
// compat: DF-033
func TestParseConfigErrors(t *testing.T) {
	for _, tc := range []struct{ attr, value, want string }{
		{"platform", "linux/amd64,", "parse target platform"},
		{"multi-platform", "perhaps", "invalid boolean"},
		{"image-resolve-mode", "never", "it is default, pull or local"},
		{"add-hosts", "host", "key-value pair"},
		{"add-hosts", "host=there", "invalid IP address"},
		{"add-hosts", `"open`, "add-hosts"},
		{"ulimit", "nofile", "ulimit"},
		{"ulimit", "nofile=2:1", "ulimit"},
		{"shm-size", "big", "shm-size"},
		{"force-network-mode", "bridge", "sandbox, host or none"},
		{"memory", "0", "greater than 0"},
		{"memory", "-1", "greater than 0"},
		{"memory", "1g", "memory"},
		{"memswap", "-2", "greater than 0"},
		{"cpushares", "0", "greater than 0"},
		{"cpuquota", "-5", "greater than 0"},
		{"cpusetcpus", "3-1", "not a range"},
		{"cpusetcpus", "a", "invalid element"},
		{"cpusetmems", "0-99999", "more than 8192"},
		{"cache-imports", "{", "cache-imports"},
		{"build-arg:BUILDKIT_DOCKERFILE_CHECK", "nope", "invalid check option"},
		{"build-arg:BUILDKIT_GIT_ADVICE", "nope", "BUILDKIT_GIT_ADVICE"},
		{"override-copy-image", "x", "no longer supported"},
		{"build-arg:BUILDKIT_DISABLE_FILEOP", "1", "no longer supported"},
	} {
		_, err := parseConfig(map[string]string{tc.attr: tc.value}, nil)
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s=%s: got %v, want %q", tc.attr, tc.value, err, tc.want)
		}
		if err != nil && !strings.Contains(err.Error(), strings.TrimPrefix(tc.attr, argPrefix)) {
			t.Errorf("%s=%s: %v doesn't name the attribute", tc.attr, tc.value, err)
		}
	}
}

func TestParseConfig(t *testing.T) {
	arm := ocispec.Platform{OS: "linux", Architecture: "arm64"}
	c, err := parseConfig(map[string]string{
		"memswap":                             "-1",
		"cpusetcpus":                          "0-3, 5",
		"hostname":                            "plain",
		"build-arg:BUILDKIT_SANDBOX_HOSTNAME": "wins",
		"build-arg:BUILDKIT_MULTI_PLATFORM":   "1",
		"platform":                            "linux/aarch64",
		"shm-size":                            "",
		"build-arg:BUILDKIT_DISABLE_FILEOP":   "false",
		"label:a":                             "b",
		"no-cache":                            "One,two",
		"cache-from":                          "x",
		"build-arg:BUILDKIT_INLINE_CACHE":     "1",
		"something-newer-than-this-frontend-knows": "x",
	}, []ocispec.Platform{arm})
	if err != nil {
		t.Fatal(err)
	}
	if want := (llb.LinuxResources{MemorySwap: -1, CpusetCpus: "0-3, 5"}); *c.resources != want {
		t.Errorf("resources %+v", *c.resources)
	}
	if c.hostname != "wins" || !c.multiPlatform || c.labels["a"] != "b" || len(c.cacheImports) != 1 {
		t.Errorf("config %+v", c)
	}
	if !reflect.DeepEqual(c.platforms, []ocispec.Platform{arm}) || !reflect.DeepEqual(c.buildPlatform, arm) {
		t.Errorf("platforms %v, build platform %v", c.platforms, c.buildPlatform)
	}
	for stage, want := range map[string]bool{"one": true, "TWO": true, "three": false, "": false} {
		if c.skipsCache(stage) != want {
			t.Errorf("skips cache of %q: %v", stage, !want)
		}
	}
}

func TestCheckCaps(t *testing.T) {
	for _, tc := range []struct {
		list              string
		fails, forwadable bool
	}{
		{"", false, false},
		{"moby.buildkit.frontend.inputs,moby.buildkit.frontend.contexts+forward", false, false},
		{"nope", true, false},
		{"nope+forward", true, true},
		{"nope+forward,other", true, false},
	} {
		forwardable, err := checkCaps(tc.list)
		if (err != nil) != tc.fails || forwardable != tc.forwadable {
			t.Errorf("%q: forwardable %v, %v", tc.list, forwardable, err)
		}
	}
}

func TestParsePorts(t *testing.T) {
	for spec, want := range map[string]string{
		"80":                  "80/tcp",
		"80/UDP":              "80/udp",
		"1-3/sctp":            "1/sctp 2/sctp 3/sctp",
		"8080:80":             "80/tcp",
		"127.0.0.1:8080:80":   "80/tcp",
		"[::1]:1-2:80":        "80/tcp",
		"::1:8080:80":         "80/tcp",
		"0":                   "0/tcp",
		"65535":               "65535/tcp",
		"65536":               "error",
		"-1":                  "error",
		"3-1":                 "error",
		"":                    "error",
		"/tcp":                "error",
		"80/icmp":             "error",
		"x:80":                "error",
		"1-2:80-85":           "error",
		"999.0.0.1:8080:80":   "error",
		"[::1:8080:80":        "error",
		"1-99999999999999999": "error",
	} {
		p, err := parsePorts(spec)
		got := strings.Join(p.list(), " ")
		if err != nil {
			got = "error"
		}
		if got != want {
			t.Errorf("%q: got %s (%v), want %s", spec, got, err, want)
		}
	}
}

func TestResolvePath(t *testing.T) {
	for _, tc := range []struct {
		dir, path, os string
		keep          bool
		want          string
	}{
		{"/w", "a/../b", "linux", false, "/w/b"},
		{"/w", "", "linux", false, "/w"},
		{"", "x", "linux", false, "/x"},
		{"/w", "/abs/", "linux", false, "/abs/"},
		{"/w", "dir/", "linux", true, "/w/dir/"},
		{"/w", "./", "linux", true, "/w/"},
		{"/w", "dir/.", "linux", true, "/w/dir/."},
		{"/w", `a\b`, "linux", false, `/w/a\b`},
		{`C:\w`, `a\b`, "windows", false, "/w/a/b"},
		{"/", `c:\x\`, "windows", true, "/x/"},
		{"/", `c:rel`, "windows", false, "/rel"},
		{"/", `d:\x`, "windows", false, "error"},
		{"/", `\\host\share`, "windows", false, "error"},
		{"/", "c:", "windows", false, "error"},
	} {
		got, err := resolvePath(tc.dir, tc.path, tc.os, tc.keep)
		if err != nil {
			got = "error"
		}
		if got != tc.want {
			t.Errorf("%q below %q on %s: got %q (%v), want %q", tc.path, tc.dir, tc.os, got, err, tc.want)
		}
	}
}
