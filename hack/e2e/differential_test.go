//go:build e2e

package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/hack/harness"
	"golang.org/x/sys/unix"
)

// differential are Dockerfiles that kiln and upstream's buildkitd must make the
// same image of: config (apart from times) and files (names, types, modes,
// owners, links, xattrs, content).
var differential = []struct {
	name, dockerfile string
	args             []string
}{
	{name: "config", dockerfile: configured},
	{name: "copy-file", dockerfile: "FROM scratch\nCOPY f /\nCOPY f /a/b/c\nCOPY f /d/\n"},
	{name: "copy-many", dockerfile: "FROM BASE\nCOPY f g dir/ /many/\nCOPY dir /many/dir2\n"},
	{name: "copy-wildcards", dockerfile: "FROM BASE\nCOPY d*/[a-x]* /w/\nCOPY ?  /q/\n"},
	{name: "copy-symlinks", dockerfile: "FROM BASE\nCOPY links /links\nCOPY links/rel /followed\nCOPY links/dir /dir\nCOPY links/dir/x /x\n"},
	{name: "copy-over-symlink", dockerfile: "FROM BASE\nRUN mkdir /t && ln -s /t /l && ln -s t/f /fl && echo o > /t/f\nCOPY f /l/n\nCOPY f /fl\nCOPY dir /l\n"},
	{name: "copy-modes", dockerfile: "FROM BASE\nCOPY modes /modes\nCOPY --chmod=4711 f /s\nCOPY --chmod=u+x,g=,o-r f /t\nCOPY --chmod=0700 dir /d\n"},
	{name: "copy-owner", dockerfile: "FROM BASE\nCOPY --chown=daemon f /a\nCOPY --chown=daemon:nobody dir /b\nCOPY --chown=12:34 dir /c/d/e\nCOPY --chown=:10 f /g\n"},
	{name: "copy-hardlinks", dockerfile: "FROM scratch\nCOPY hard /hard\n"},
	{name: "copy-times", dockerfile: "FROM scratch\nCOPY old /old\n"},
	{name: "copy-exclude", dockerfile: "FROM scratch\nCOPY --exclude=dir/s* --exclude=**/x . /\n"},
	{name: "copy-parents", dockerfile: "FROM scratch\nCOPY --parents dir/sub/y links/../f /p/\nCOPY --parents ./dir/./sub/y /q/\n"},
	{name: "copy-heredoc", dockerfile: "FROM BASE\nARG A=1\nCOPY <<EOF <<-\"X\" /h/\nv=$A\nEOF\n\ttabs $A\nX\nCOPY --chmod=755 <<s /bin/s\n#!/bin/sh\ns\n"},
	{name: "copy-from-stage", dockerfile: "FROM BASE AS a\nRUN mkdir -p /x/y && echo 1 > /x/y/z && chown 5:6 /x/y/z && chmod 640 /x/y/z && mkfifo /x/p && ln /x/y/z /x/hard\nFROM scratch\nCOPY --from=a /x /x\nCOPY --from=a /x/y/z /\n"},
	{name: "copy-link", dockerfile: "FROM BASE\nCOPY --link f /l/f\nCOPY --link dir /l/dir/\n"},
	{name: "copy-root", dockerfile: "FROM scratch\nCOPY . /\n"},
	{name: "add-archives", dockerfile: "FROM BASE\nADD a.tar.gz /x/\nADD a.tar /y\nADD f /z/\nADD --unpack=false a.tar /packed/\n"},
	{name: "add-chown", dockerfile: "FROM BASE\nADD --chown=daemon:wheel --chmod=0600 f /n\nADD --chown=3:4 a.tar /o/\n"},
	{name: "dockerignore", dockerfile: "FROM scratch\nCOPY . /all/\nCOPY dir/*  /dir/\n", args: []string{"ignore"}},
	{name: "whiteouts", dockerfile: "FROM BASE\nRUN rm -r /usr /bin/vi && mkdir /usr && echo n > /usr/new\nRUN rm -r /home && ln -s /root /home\nRUN rm /home && mkdir /home\nRUN rm -rf /var/tmp/* && rm -r /var && mkdir -p /var/tmp\n"},
	{name: "run-file-types", dockerfile: "FROM BASE\nRUN mkdir /t && cd /t && touch a && ln a b && ln -s a c && mkfifo d && mknod e c 1 3 && mkdir -m 1777 g && chmod 4755 a && chown 7:8 a d\n"},
	{name: "run-rename", dockerfile: "FROM BASE\nRUN mkdir -p /r/one/two && echo x > /r/one/two/f\nRUN mv /r/one /r/uno && mv /r/uno/two/f /r/g\n"},
	{name: "run-xattrs", dockerfile: "FROM XATTRS\nRUN cp -a /bin/cap /bin/cap2 && touch /x\nCOPY xattr /xattr\n"},
	{name: "run-user", dockerfile: "FROM BASE\nRUN mkdir -m 777 /w\nUSER daemon\nRUN touch /w/u\nUSER 1000:10\nRUN touch /w/n\nWORKDIR /w/home\nRUN touch f\n"},
	{name: "run-mount-stubs", dockerfile: "FROM BASE\nRUN --mount=type=cache,target=/new/cache --mount=type=tmpfs,target=/etc/t --mount=source=f,target=/stub/file true\n"},
	{name: "workdir", dockerfile: "FROM scratch\nWORKDIR /a/b\nWORKDIR c\nCOPY f .\nENV D=/dd\nWORKDIR $D\n"},
	{name: "env-arg", dockerfile: "ARG G=global\nFROM BASE\nARG G\nARG B=def C\nENV A=$G-${B:-x}-${C:+y} Q=\"a b\" S='$A' E=\nENV A2=${A%%-*} A3=${A/-/_} A4=${A//-/_}\nLABEL l=\"$A\" m=$G\nRUN echo $A $A2 $A3 $A4 > /env\n", args: []string{"--opt", "build-arg:B=given"}},
	{name: "onbuild", dockerfile: "FROM BASE AS p\nONBUILD ENV O=1\nONBUILD COPY f /onbuild\nONBUILD RUN echo $O > /o\nFROM p\nCMD x\n"},
	{name: "entrypoint-resets-cmd", dockerfile: "FROM BASE\nENTRYPOINT [\"e\"]\nFROM BASE\nCMD c\nENTRYPOINT e f\nSHELL [\"/bin/ash\", \"-c\"]\nRUN true\n"},
	{name: "many-stages", dockerfile: "FROM BASE AS a\nRUN echo a > /a\nFROM a AS b\nRUN echo b > /b\nFROM scratch AS c\nCOPY --from=a /a /1\nCOPY --from=b /a /b /2/\nFROM c\nCOPY --from=0 /a /3\nEXPOSE 1-3/udp 9\nVOLUME [\"/v\", \"/w\"]\nMAINTAINER me\n"},
	{name: "replace-kinds", dockerfile: "FROM BASE\nRUN mkdir -p /k/dir/sub && echo f > /k/file && ln -s file /k/link\nRUN cd /k && rm -r dir && echo d > dir && rm file && mkdir file && touch file/x && rm link && mkdir link\nRUN cd /k && rm dir && mkdir -p dir/sub && rm -r link\n"},
}

// diffContext is the context of all of them.
func diffContext(t *testing.T) string {
	t.Helper()
	dir := files{
		"f": "f\n", "g": "g\n", "dir/x": "x\n", "dir/sub/y": "y\n", "dir/sub/deep/z": "z\n", "dir/empty/": "",
		"links/target": "t\n", "links/rel": "->target", "links/abs": "->/links/target", "links/dangling": "->nowhere", "links/dir": "->../dir",
		"modes/exe": "e\n", "modes/ro": "r\n", "modes/sticky/": "", "hard/a": "h\n", "old": "old\n", "xattr": "x\n", "q": "q\n",
	}.write(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Chmod(filepath.Join(dir, "modes/exe"), 0o751))
	must(os.Chmod(filepath.Join(dir, "modes/ro"), 0o444))
	must(os.Chmod(filepath.Join(dir, "modes/sticky"), 0o777|os.ModeSticky|os.ModeSetgid))
	must(os.Link(filepath.Join(dir, "hard/a"), filepath.Join(dir, "hard/b")))
	must(os.Chtimes(filepath.Join(dir, "old"), time.Time{}, time.Unix(1234567890, 123456789)))
	must(unix.Setxattr(filepath.Join(dir, "xattr"), "user.kiln", []byte("v"), 0))
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, h := range []*tar.Header{
		{Name: "t/", Typeflag: tar.TypeDir, Mode: 0o750, Uid: 11, Gid: 12},
		{Name: "t/f", Typeflag: tar.TypeReg, Mode: 0o640, Uid: 13, Gid: 14, Size: 2},
		{Name: "t/l", Typeflag: tar.TypeSymlink, Linkname: "f", Mode: 0o777},
		{Name: "t/h", Typeflag: tar.TypeLink, Linkname: "t/f", Mode: 0o640},
	} {
		h.ModTime = time.Unix(1e9, 0)
		must(tw.WriteHeader(h))
		if h.Size > 0 {
			_, err := tw.Write([]byte("t\n"))
			must(err)
		}
	}
	must(tw.Close())
	must(os.WriteFile(filepath.Join(dir, "a.tar"), buf.Bytes(), 0o644))
	var zipped bytes.Buffer
	zw := gzip.NewWriter(&zipped)
	_, err := zw.Write(buf.Bytes())
	must(err)
	must(zw.Close())
	must(os.WriteFile(filepath.Join(dir, "a.tar.gz"), zipped.Bytes(), 0o644))
	return dir
}

// peerDaemon is upstream's buildkitd.
func peerDaemon(t *testing.T) (addr string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "peer")
	if err != nil {
		t.Fatal(err)
	}
	addr = "unix://" + filepath.Join(dir, "s")
	cmd := exec.Command(filepath.Join(env.peer, "buildkitd"), "--root", filepath.Join(dir, "state"), "--addr", addr,
		"--config", "/dev/null", "--oci-worker-net", "host", "--containerd-worker=false")
	var log lockedBuffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
		unix.Unmount(filepath.Join(dir, "state"), unix.MNT_DETACH) // it may not be a mount
		os.RemoveAll(dir)
		// It leaves cgroups of its steps, and their parent.
		if err := harness.WaitFor(harness.Patience, func() (err error) {
			for _, dir := range append(cgroupDirs("/buildkit/*"), cgroupDirs("/buildkit")...) {
				if e := unix.Rmdir(dir); e != nil && !errors.Is(e, unix.ENOTDIR) && !errors.Is(e, unix.ENOENT) {
					err = fmt.Errorf("remove cgroup %s: %w", dir, e)
				}
			}
			return err
		}); err != nil {
			t.Error(err)
		}
	})
	if err := harness.WaitFor(harness.Patience, func() error {
		c, err := net.Dial("unix", filepath.Join(dir, "s"))
		if err != nil {
			return err
		}
		return c.Close()
	}); err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	return addr
}

func TestSameAsUpstream(t *testing.T) {
	pushXattrImage(t)
	d := newDaemon(t)
	peer := peerDaemon(t)
	ctx := diffContext(t)
	for _, c := range differential {
		t.Run(c.name, func(t *testing.T) {
			df := strings.NewReplacer("BASE", env.base, "XATTRS", env.registry+"/test/xattrs:latest").Replace(c.dockerfile)
			dfDir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dfDir, "Dockerfile"), []byte(df), 0o644); err != nil {
				t.Fatal(err)
			}
			args := c.args
			if slices.Equal(args, []string{"ignore"}) {
				args = nil
				ignore := "f\n**/x\n!dir/x\nlinks/*\n!links/t*\n/dir/sub/deep\n"
				if err := os.WriteFile(filepath.Join(dfDir, "Dockerfile.dockerignore"), []byte(ignore), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			build := func(addr string) (layout, map[string]string) {
				out := filepath.Join(t.TempDir(), "image.tar")
				cmd := exec.Command(filepath.Join(env.peer, "buildctl"), append([]string{"--addr", addr, "build", "--progress=plain", "--frontend", "dockerfile.v0",
					"--local", "context=" + ctx, "--local", "dockerfile=" + dfDir, "--output", "type=oci,dest=" + out}, args...)...)
				runCommand(t, cmd).must(t)
				l, _ := readArchive(t, out)
				return l, flatten(t, l)
			}
			ours, ourFiles := build(d.addr)
			theirs, theirFiles := build(peer)
			if a, b := comparableConfig(t, ours), comparableConfig(t, theirs); a != b {
				t.Errorf("image config differs\nkiln:     %s\nupstream: %s", a, b)
			}
			wantSame(t, ourFiles, theirFiles)
		})
	}
}

// wantSame compares what two images hold.
func wantSame(t *testing.T, ours, theirs map[string]string) {
	t.Helper()
	for _, name := range slices.Sorted(maps.Keys(theirs)) {
		if ours[name] != theirs[name] {
			t.Errorf("%s\nkiln:     %s\nupstream: %s", name, ours[name], theirs[name])
		}
	}
	for _, name := range slices.Sorted(maps.Keys(ours)) {
		if theirs[name] == "" {
			t.Errorf("%s is only in kiln's image: %s", name, ours[name])
		}
	}
}

// comparableConfig is the config without times and digests of layers.
func comparableConfig(t *testing.T, l layout) string {
	t.Helper()
	var m map[string]any
	unmarshal(t, l.blob(l.manifest.Config.Digest), &m)
	delete(m, "created")
	rootfs := m["rootfs"].(map[string]any)
	if ids, ok := rootfs["diff_ids"].([]any); ok {
		rootfs["diff_ids"] = len(ids)
	}
	for _, h := range m["history"].([]any) {
		delete(h.(map[string]any), "created")
	}
	out, err := json.MarshalIndent(m, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// flatten applies the layers in order and describes every path.
func flatten(t *testing.T, l layout) map[string]string {
	t.Helper()
	out := map[string]string{}
	remove := func(name string) {
		for p := range out {
			if p == name || strings.HasPrefix(p, name+"/") {
				delete(out, p)
			}
		}
	}
	for _, desc := range l.manifest.Layers {
		zr, err := gzip.NewReader(bytes.NewReader(l.blob(desc.Digest)))
		if err != nil {
			t.Fatal(err)
		}
		tr := tar.NewReader(zr)
		for {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			name := strings.TrimSuffix(strings.TrimPrefix(h.Name, "./"), "/")
			dir, base := path.Split(name)
			if base == ".wh..wh..opq" {
				remove(strings.TrimSuffix(dir, "/") + "/")
				for p := range out {
					if strings.HasPrefix(p, dir) {
						delete(out, p)
					}
				}
				continue
			}
			if gone, ok := strings.CutPrefix(base, ".wh."); ok {
				remove(dir + gone)
				continue
			}
			if h.Typeflag != tar.TypeDir {
				remove(name)
			}
			data, err := io.ReadAll(tr)
			if err != nil {
				t.Fatal(err)
			}
			out[name] = describe(h, data, out)
		}
	}
	return out
}

func describe(h *tar.Header, data []byte, seen map[string]string) string {
	if h.Typeflag == tar.TypeLink {
		return seen[strings.TrimPrefix(h.Linkname, "/")]
	}
	s := fmt.Sprintf("type %c mode %o owner %d:%d link %q dev %d:%d", h.Typeflag, h.Mode, h.Uid, h.Gid, h.Linkname, h.Devmajor, h.Devminor)
	for _, k := range slices.Sorted(maps.Keys(h.PAXRecords)) {
		if strings.HasPrefix(k, "SCHILY.xattr.") {
			s += fmt.Sprintf(" %s=%q", k, h.PAXRecords[k])
		}
	}
	if h.Typeflag == tar.TypeReg {
		s += fmt.Sprintf(" size %d sha256 %x", len(data), sha256.Sum256(data))
		if h.ModTime.Year() < 2020 {
			s += " time " + h.ModTime.UTC().String()
		}
	}
	return s
}
