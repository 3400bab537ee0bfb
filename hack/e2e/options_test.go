//go:build e2e

package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/buildkit/client"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// compat: BCL-024, DF-125, DF-126, SES-073
func TestOCILayoutAsContext(t *testing.T) {
	d := newDaemon(t)
	const dockerfile = "FROM base AS b\nFROM scratch\nCOPY --from=b /etc/group /\n"
	build := func(context string) []string {
		return []string{"--oci-layout", "store=" + env.layout.Dir, "--opt", "context:base=oci-layout://" + context}
	}
	out := d.local(dockerfile, nil, build(fmt.Sprintf("store@%s", env.layout.Manifest.Digest))...)
	if got := readFile(t, out, "group"); !strings.Contains(got, "wheel:x:10") {
		t.Errorf("group = %q", got)
	}
	missing := "sha256:" + strings.Repeat("0", 64)
	for context, want := range map[string][]string{
		"store@" + missing: {"store", missing, "not found"},
		fmt.Sprintf("other@%s", env.layout.Manifest.Digest): {"other", "not found"},
		"store:latest": {"store:latest", "no digest"},
	} {
		d.dockerfile(dockerfile, nil, build(context)...).fails(t, want...)
	}
}

// compat: DF-034, DF-125
func TestNamedContexts(t *testing.T) {
	runOutCases(t, []outCase{
		{
			name:       "ImageForAnImage",
			dockerfile: "FROM no-such-image AS b\nFROM scratch\nCOPY --from=b /etc/group /\n",
			args:       []string{"--opt", "context:no-such-image=docker-image://BASEREF"},
			check: func(t *testing.T, out string) {
				if got := readFile(t, out, "group"); !strings.Contains(got, "wheel:x:10") {
					t.Errorf("group = %q", got)
				}
			},
		},
		{
			name:       "DirectoryForAnImage",
			dockerfile: "FROM scratch\nCOPY --from=files.example/x dir /\n",
			args:       []string{"--opt", "context:files.example/x=local:extra", "--local", "extra=" + files{"dir/f": "from the directory"}.write(t)},
			want:       map[string]string{"f": "from the directory"},
		},
		{
			name:       "DirectoryForAStage",
			dockerfile: "FROM BASE AS made\nRUN exit 1\nFROM scratch\nCOPY --from=made f /\n",
			args:       []string{"--opt", "context:made=local:extra", "--local", "extra=" + files{"f": "instead of the stage"}.write(t)},
			want:       map[string]string{"f": "instead of the stage"},
		},
	})
	t.Run("Errors", func(t *testing.T) {
		d := newDaemon(t)
		d.dockerfile("FROM base\n", nil, "--opt", "context:base=local:nowhere").fails(t, "nowhere")
		d.dockerfile("FROM base\n", nil, "--opt", "context:base=bogus://x").fails(t, "bogus", "base")
		d.dockerfile("FROM base\nRUN true\n", nil, "--opt", "context:base=docker-image://"+env.registry+"/no/such:one").fails(t, "no/such:one", "not found")
	})
}

// A layer that is linked doesn't depend on what is below it. compat: DF-092
func TestLinkedLayerIsTheSameOnAnyBase(t *testing.T) {
	d := newDaemon(t)
	layer := func(base string, age time.Duration) ocispec.Descriptor {
		dir := files{"f": "linked", "Dockerfile": "FROM " + env.base + "\nRUN echo " + base + " > /x\nCOPY --link f /deep/er/f\n"}.write(t)
		// Whoever copied again would copy this time.
		when := time.Now().Add(-age)
		if err := os.Chtimes(filepath.Join(dir, "f"), when, when); err != nil {
			t.Fatal(err)
		}
		out := filepath.Join(t.TempDir(), "image.tar")
		d.dockerfileIn(dir, "--output", "type=oci,dest="+out).must(t)
		l, _ := readArchive(t, out)
		last := len(l.manifest.Layers) - 1
		if got := l.entries(t, last); !slices.Equal(got, []string{"deep/", "deep/er/", "deep/er/f"}) {
			t.Errorf("the linked layer holds %q", got)
		}
		return l.manifest.Layers[last]
	}
	if a, b := layer("one base", 0), layer("another", time.Hour); a.Digest != b.Digest {
		t.Errorf("layers %s and %s", a.Digest, b.Digest)
	}
}

// A checksum that can't be one is refused with its line.
// compat: CTL-082, X-10
func TestWrongChecksums(t *testing.T) {
	d := newDaemon(t)
	for line, want := range map[string]string{
		"ADD --checksum=sha256:12 https://files.example/f.txt /got":    "sha256:12",
		"ADD --checksum=sha256:" + strings.Repeat("1", 64) + " f /got": "checksum",
	} {
		d.dockerfile("FROM scratch\n"+line+"\n", files{"f": "x"}).fails(t, "Dockerfile:2", ">>> "+line, want)
	}
}

// compat: BCL-020, BCL-034, BCL-037, EXP-007, EXP-058
func TestSeveralOutputs(t *testing.T) {
	d := newDaemon(t)
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	d.dockerfile("FROM scratch\nCOPY f /f\n", files{"f": "many"},
		"--output", "type=local,dest="+path("dir"), "--output", "type=oci,dest="+path("oci.tar"), "--output", "type=docker,name=app:1,dest="+path("docker.tar"),
		"--output", "type=image,push=true,name="+env.registry+"/many/app:1", "--metadata-file", path("meta.json"), "--ref-file", path("ref")).must(t)
	if got := readFile(t, dir, "dir", "f"); got != "many" {
		t.Errorf("f = %q", got)
	}
	oci, _ := readArchive(t, path("oci.tar"))
	docker, _ := readArchive(t, path("docker.tar"))
	pushed := readImage(t, "many/app", "1")
	if a, b, c := oci.config.RootFS.DiffIDs[0], docker.config.RootFS.DiffIDs[0], pushed.config.RootFS.DiffIDs[0]; a != b || b != c {
		t.Errorf("the outputs hold the layers %s, %s and %s", a, b, c)
	}
	var meta map[string]any
	unmarshal(t, []byte(readFile(t, dir, "meta.json")), &meta)
	if name := fmt.Sprint(meta["image.name"]); !strings.Contains(name, "many/app:1") {
		t.Errorf("metadata %v", meta)
	}
	if r := d.buildctl("debug", "histories").must(t); !strings.Contains(r.stdout, readFile(t, dir, "ref")) {
		t.Errorf("the build %s is not in the history:\n%s", readFile(t, dir, "ref"), r.stdout)
	}
}

// compat: BCL-027, DF-025
func TestNoCache(t *testing.T) {
	d := newDaemon(t)
	const dockerfile = "FROM BASE AS one\nRUN cat /proc/sys/kernel/random/uuid > /one\nFROM BASE AS two\nRUN cat /proc/sys/kernel/random/uuid > /two\nFROM scratch\nCOPY --from=one /one /\nCOPY --from=two /two /\n"
	build := func(args ...string) (one, two string) {
		out := d.local(dockerfile, nil, args...)
		return readFile(t, out, "one"), readFile(t, out, "two")
	}
	one, two := build()
	check := func(what string, args []string, newOne, newTwo bool) {
		t.Helper()
		a, b := build(args...)
		if a != one != newOne || b != two != newTwo {
			t.Errorf("%s: stage one ran: %t, want %t; stage two ran: %t, want %t", what, a != one, newOne, b != two, newTwo)
		}
		one, two = a, b
	}
	check("again", nil, false, false)
	check("--no-cache", []string{"--no-cache"}, true, true)
	check("after it", nil, false, false)
	check("no-cache=two", []string{"--opt", "no-cache=two"}, false, true)
	check("after that", nil, false, false)
}

// compat: DF-021, EXP-050
func TestPlatforms(t *testing.T) {
	d := newDaemon(t)
	foreign := "arm64"
	if runtime.GOARCH == foreign {
		foreign = "amd64"
	}
	both := "platform=linux/" + runtime.GOARCH + ",linux/" + foreign
	t.Run("FilesOnly", func(t *testing.T) {
		out := filepath.Join(t.TempDir(), "image.tar")
		d.dockerfile("FROM scratch\nARG TARGETARCH\nCOPY $TARGETARCH /arch\n", files{"amd64": "a", "arm64": "b"}, "--opt", both, "--output", "type=oci,dest="+out).must(t)
		l, _ := readArchiveIndex(t, out)
		var got []string
		for _, m := range l.index.Manifests {
			l.load(t, m.Digest)
			if m.Platform.Architecture != l.config.Architecture {
				t.Errorf("the index says %s, the config %s", m.Platform.Architecture, l.config.Architecture)
			}
			got = append(got, l.config.Architecture+" "+fmt.Sprint(l.entries(t, 0)))
		}
		slices.Sort(got)
		if !slices.Equal(got, []string{"amd64 [arch]", "arm64 [arch]"}) {
			t.Errorf("platforms %q", got)
		}
		dirs := t.TempDir()
		d.dockerfile("FROM scratch\nARG TARGETARCH\nCOPY $TARGETARCH /arch\n", files{"amd64": "a", "arm64": "b"}, "--opt", both, "--output", "type=local,dest="+dirs).must(t)
		if a, b := readFile(t, dirs, "linux_amd64", "arch"), readFile(t, dirs, "linux_arm64", "arch"); a != "a" || b != "b" {
			t.Errorf("amd64 has %q, arm64 %q", a, b)
		}
	})
	t.Run("BadPlatform", func(t *testing.T) {
		d.dockerfile("FROM scratch\nCOPY f /\n", files{"f": "x"}, "--opt", "platform=linux/a/b/c/d").fails(t, "linux/a/b/c/d")
	})
	t.Run("NoEmulator", func(t *testing.T) {
		d.dockerfile("FROM scratch\nCOPY --from=BASE / /\nRUN true\n", nil, "--opt", both).fails(t, "linux/"+foreign, "emulator")
	})
}

// compat: CTL-023, DMN-008, DF-080, DF-081, LLB-028, LLB-029, LLB-C45
func TestEntitlements(t *testing.T) {
	const insecure = "FROM BASE AS b\nRUN --security=insecure grep CapEff /proc/self/status > /f\nFROM scratch\nCOPY --from=b /f /\n"
	const host = "FROM BASE AS b\nRUN --network=host readlink /proc/self/ns/net > /f\nFROM scratch\nCOPY --from=b /f /\n"
	closed := newDaemon(t)
	closed.dockerfile(insecure, nil, "--allow", "security.insecure").fails(t, "security.insecure", "not allowed")
	closed.dockerfile(host, nil, "--allow", "network.host").fails(t, "network.host", "not allowed")
	open := newDaemon(t, "--allow-insecure-entitlement", "security.insecure", "--allow-insecure-entitlement", "network.host")
	open.dockerfile(insecure, nil).fails(t, "security.insecure", "not allowed")
	open.dockerfile(host, nil).fails(t, "network.host", "not allowed")
	open.dockerfile(host, nil, "--allow", "security.insecure").fails(t, "network.host", "not allowed")
	if got := strings.Fields(readFile(t, open.local(insecure, nil, "--allow", "security.insecure"), "f"))[1]; strings.Count(strings.TrimLeft(got, "0"), "f") < 8 {
		t.Errorf("an insecure step has the capabilities %s", got)
	}
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.TrimSpace(readFile(t, open.local(host, nil, "--allow", "network.host"), "f")); got != own {
		t.Errorf("a step in the host's network is in %s, not in %s", got, own)
	}
}

// compat: BCL-022, BCL-053
func TestMachineReadableProgress(t *testing.T) {
	d := newDaemon(t)
	trace := filepath.Join(t.TempDir(), "trace")
	raw := d.dockerfile("FROM BASE\nRUN echo to stdout; echo to stderr >&2\n", nil, "--progress", "rawjson", "--trace", trace).must(t).stderr
	for what, text := range map[string]string{"rawjson": raw, "trace": readFile(t, trace)} {
		var run *client.Vertex
		stdout, stderr := "", ""
		for lines := bufio.NewScanner(strings.NewReader(text)); lines.Scan(); {
			if !strings.HasPrefix(lines.Text(), "{") {
				continue // a warning of the client
			}
			var s client.SolveStatus
			if err := json.Unmarshal(lines.Bytes(), &s); err != nil {
				t.Fatalf("%s: %v in %s", what, err, lines.Text())
			}
			for _, v := range s.Vertexes {
				if strings.Contains(v.Name, "RUN echo") {
					run = v
				}
			}
			for _, l := range s.Logs {
				switch {
				case run == nil || l.Vertex != run.Digest:
				case l.Stream == 1:
					stdout += string(l.Data)
				default:
					stderr += string(l.Data)
				}
			}
		}
		if run == nil || run.Started == nil || run.Completed == nil || run.Error != "" {
			t.Errorf("%s: the step is told as %+v", what, run)
		}
		if stdout != "to stdout\n" || stderr != "to stderr\n" {
			t.Errorf("%s: the step printed %q and %q", what, stdout, stderr)
		}
	}
}
