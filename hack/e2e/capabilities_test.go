//go:build e2e

package e2e

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/client/llb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/apicaps"
)

// capability is what a definition may require, and a state that makes use of it.
type capability struct {
	id    apicaps.CapID
	state llb.State
	// want is what the state's file r holds; "..." stands for anything.
	want string
}

// steps makes states of scripts that run in the busybox image and write to /o/r.
func steps(script string, opts ...llb.RunOption) llb.State {
	return stepsOn(llb.Image(env.base), script, opts...)
}

func stepsOn(base llb.State, script string, opts ...llb.RunOption) llb.State {
	opts = append(opts, llb.Args([]string{"/bin/sh", "-ec", "{\n" + script + "\n} > /o/r"}))
	return base.Run(opts...).AddMount("/o", llb.Scratch().File(llb.Mkfile("/r", 0o666, nil)))
}

// seen is a state that says what files st has, and what they hold.
func seen(st llb.State) llb.State {
	return steps("cd /m; find . -type f | sort | while read -r f; do echo \"$f $(wc -c < $f)\"; done", llb.AddMount("/m", st, llb.Readonly))
}

// file is a state with the file p of st.
func file(st llb.State, p string) llb.State { return llb.Scratch().File(llb.Copy(st, p, "/r")) }

func sourceCapabilities(layered string) []capability {
	local := func(opts ...llb.LocalOption) llb.State { return llb.Local("ctx", opts...) }
	const all = "./a.txt 1\n./b.go 2\n./d/c.txt 3\n"
	manifest := env.layout.Manifest.Digest
	repo, _, _ := strings.Cut(strings.TrimPrefix(env.base, env.registry), ":")
	repo = env.registry + repo
	return []capability{
		{pb.CapSourceImage, file(llb.Image(env.base), "/etc/group"), "...wheel:x:10..."},
		{pb.CapSourceImageResolveMode, file(llb.Image(env.base, llb.ResolveModeForcePull), "/etc/group"), "...wheel:x:10..."},
		{pb.CapSourceImageLayerLimit, seen(llb.Image(layered, llb.LayerLimit(1))), "./one 4\n"},
		{pb.CapSourceImageChecksum, file(llb.Image(env.base, llb.ImageChecksum(manifest)), "/etc/group"), "...wheel:x:10..."},
		{pb.CapSourceImageBlob, file(llb.ImageBlob(repo+"@"+env.layout.Blobs[0].Digest.String(), llb.Filename("f")), "/f"), "...rootfs..."},
		{pb.CapSourceOCILayout, file(llb.OCILayout("any.host/store@"+string(manifest), llb.OCIStore("", "store")), "/etc/group"), "...wheel:x:10..."},

		{pb.CapSourceLocal, seen(local()), all},
		{pb.CapSourceLocalUnique, seen(llb.Local("ctx", llb.LocalUniqueID("of this client"))), all},
		{pb.CapSourceLocalIncludePatterns, seen(local(llb.IncludePatterns([]string{"**/*.txt"}))), "./a.txt 1\n./d/c.txt 3\n"},
		{pb.CapSourceLocalExcludePatterns, seen(local(llb.ExcludePatterns([]string{"d"}))), "./a.txt 1\n./b.go 2\n"},
		{pb.CapSourceLocalFollowPaths, seen(local(llb.FollowPaths([]string{"link"}))), "./b.go 2\n"},
		{pb.CapSourceLocalSharedKeyHint, seen(local(llb.SharedKeyHint("hint"))), all},
		{pb.CapSourceLocalDiffer, seen(local(llb.Differ(llb.DiffNone, true))), all},
		{pb.CapSourceMetadataTransfer, seen(local(llb.MetadataOnlyTransfer([]string{"d/c.txt"}))), "./.fsutil-metadata...\n./d/c.txt 3\n"},
	}
}

func execCapabilities() []capability {
	base := llb.Image(env.base)
	tree := llb.Scratch().File(llb.Mkdir("/d/sub", 0o755, llb.WithParents(true)).Mkfile("/d/sub/f", 0o644, []byte("deep")).Mkfile("/f", 0o644, nil))
	// What a step does to a mount is seen in its output, and thrown away without one.
	touch := func(opts ...llb.MountOption) llb.State {
		return base.Run(llb.Args([]string{"/bin/sh", "-ec", "touch /m/new && ls /m | tr '\\n' ' ' > /seen"}), llb.AddMount("/m", tree, opts...)).Root()
	}
	kept := base.Run(llb.Args([]string{"touch", "/m/new"})).AddMount("/m", tree)
	return []capability{
		{pb.CapExecMetaBase, stepsOn(base.AddEnv("A", "b c").Dir("/w/x").User("7:8"), "echo $A, $PWD, $(id -u):$(id -g)"), "b c, /w/x, 7:8\n"},
		{pb.CapExecMetaNetwork, stepsOn(base.Network(pb.NetMode_NONE), "ls /sys/class/net; grep -c : /proc/net/dev"), "lo\n1\n"},
		{pb.CapExecMetaProxy, steps("echo $http_proxy $HTTP_PROXY $https_proxy $no_proxy $NO_PROXY",
			llb.WithProxy(llb.ProxyEnv{HTTPProxy: "h", HTTPSProxy: "s", NoProxy: "n"})), "h h s n n\n"},
		{pb.CapExecMetaSetsDefaultPath, steps("echo $PATH"), "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"},
		{pb.CapExecMetaUlimit, stepsOn(base.AddUlimit("nofile", 77, 88), "ulimit -Sn; ulimit -Hn"), "77\n88\n"},

		{pb.CapExecMountBind, seen(kept), "./d/sub/f 4\n./f 0\n./new 0\n"},
		{pb.CapExecMountBindReadWriteNoOutput, stepsOn(touch(llb.ForceNoOutput), "cat /seen; ls /t", llb.AddMount("/t", tree, llb.Readonly)), "d f new d\nf\n"},
		{pb.CapExecMountSelector, steps("cat /m/f; ls /m", llb.AddMount("/m", tree, llb.SourcePath("/d/sub"), llb.Readonly)), "deepf\n"},
		{pb.CapExecMountTmpfs, steps("grep -c ' /t tmpfs rw,nosuid' /proc/mounts", llb.AddMount("/t", llb.Scratch(), llb.Tmpfs(0))), "1\n"},
		{pb.CapExecMountTmpfsSize, steps("grep -o ' /t tmpfs.*size=1024k' /proc/mounts | wc -l", llb.AddMount("/t", llb.Scratch(), llb.Tmpfs(1<<20))), "1\n"},
		{pb.CapExecMountSecret, steps("stat -c '%a %u:%g' /run/s; cat /run/s", llb.AddSecret("/run/s", llb.SecretID("id"), llb.SecretFileOpt(7, 8, 0o440))), "440 7:8\nwhat nobody knows"},
		{pb.CapExecMountSSH, steps("test -S $SSH_AUTH_SOCK && stat -c '%a %u:%g' $SSH_AUTH_SOCK", llb.AddSSHSocket(llb.SSHSocketOpt("/run/agent", 7, 8, 0o640))), "640 7:8\n"},
		{pb.CapExecSecretEnv, steps("echo $S", llb.AddSecretEnv("id", "S")), "what nobody knows\n"},
		{pb.CapExecValidExitCode, steps("echo before; exit 3", llb.ValidExitCodes(3)), "before\n"},
	}
}

// ownCapabilities aren't compared with upstream's: which cgroups there are is the
// daemon's affair, and upstream gives a step another cache if the step before it
// has only just ended.
func ownCapabilities() []capability {
	base := llb.Image(env.base)
	cached := func(id string, sharing llb.CacheMountSharingMode) llb.State {
		cache := llb.AddMount("/c", llb.Scratch(), llb.AsPersistentCacheDir(id, sharing))
		first := base.Run(llb.Args([]string{"/bin/sh", "-ec", "echo of " + id + " > /c/f"}), cache).Root()
		return stepsOn(first, "cat /c/f", cache)
	}
	return []capability{
		{pb.CapExecCgroupsMounted, steps("grep -c ' /sys/fs/cgroup' /proc/mounts | grep -v '^0'"), "..."},
		{pb.CapExecMountCache, cached("plain", llb.CacheMountShared), "of plain\n"},
		{pb.CapExecMountCacheSharing, cached("locked", llb.CacheMountLocked), "of locked\n"},
	}
}

// Each capability that a definition may require, but for those of actions on
// files, does what it says, and the same as upstream's. The step that
// uses it is one of a build that requires all of them.
//
// compat: LLB-C01, LLB-C02, LLB-C03, LLB-C04, LLB-C05, LLB-C06, LLB-C07, LLB-C08, LLB-C10, LLB-C11, LLB-C12, LLB-C13, LLB-C14, LLB-C15
// compat: LLB-C40, LLB-C42, LLB-C44, LLB-C47, LLB-C48, LLB-C51, LLB-C52, LLB-C53, LLB-C54, LLB-C56, LLB-C57, LLB-C58, LLB-C59, LLB-C60, LLB-C61, LLB-C62, LLB-C63
func TestCapabilitiesAsUpstream(t *testing.T) {
	d := newDaemon(t)
	layered := env.registry + "/layered:latest"
	d.dockerfile("FROM scratch\nCOPY one /\nCOPY two /\n", files{"one": "1111", "two": "22"}, "--output", "type=image,push=true,name="+layered).must(t)
	compared := append(sourceCapabilities(layered), execCapabilities()...)
	all := append(slices.Clip(compared), ownCapabilities()...)
	ours := buildTogether(t, d.addr, together(t, all))
	theirs := buildTogether(t, peerDaemon(t), together(t, compared))
	for i, c := range all {
		t.Run(string(c.id), func(t *testing.T) {
			got := readFile(t, ours, string(c.id))
			if begin, end, open := strings.Cut(c.want, "..."); got != c.want && !open ||
				!strings.HasPrefix(got, begin) || !strings.Contains(got, strings.TrimSuffix(end, "...")) {
				t.Errorf("got %q, want %q", got, c.want)
			}
			if i >= len(compared) {
				return
			}
			if want := readFile(t, theirs, string(c.id)); got != want {
				t.Errorf("got %q, upstream gives %q", got, want)
			}
		})
	}
}

// together is a definition of what all are about, in files that are called like
// them.
func together(t *testing.T, all []capability) *pb.Definition {
	t.Helper()
	var files *llb.FileAction
	for _, c := range all {
		if files == nil {
			files = llb.Copy(c.state, "/r", "/"+string(c.id))
		} else {
			files = files.Copy(c.state, "/r", "/"+string(c.id))
		}
	}
	def, err := llb.Scratch().File(files).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range all {
		require(def, c.id)
	}
	return def
}

// buildTogether builds def as a client that has what its sources and steps ask
// for, and returns the directory of the result.
func buildTogether(t *testing.T, addr string, def *pb.Definition) string {
	t.Helper()
	var in bytes.Buffer
	if err := llb.WriteTo(def, &in); err != nil {
		t.Fatal(err)
	}
	ctx := files{"a.txt": "a", "b.go": "bb", "d/c.txt": "ccc"}.write(t)
	if err := os.Symlink("b.go", filepath.Join(ctx, "link")); err != nil {
		t.Fatal(err)
	}
	secret := files{"secret": "what nobody knows"}.write(t)
	out := t.TempDir()
	cmd := exec.Command(filepath.Join(env.peer, "buildctl"), "--addr", addr, "build", "--progress=plain",
		"--local", "ctx="+ctx, "--oci-layout", "store="+env.layout.Dir, "--ssh", "default="+startAgent(t).socket,
		"--secret", fmt.Sprintf("id=id,src=%s/secret", secret), "--output", "type=local,dest="+out)
	cmd.Stdin = &in
	runCommand(t, cmd).must(t)
	return out
}

// What a client asks of the export and of the cache, by definitions that require
// the capability for it.
//
// compat: LLB-C82, LLB-C84, LLB-C85, LLB-C87
func TestCapabilitiesOfTheClient(t *testing.T) {
	d := newDaemon(t)
	def, err := llb.Scratch().File(llb.Mkfile("/f", 0o644, []byte("x"))).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []apicaps.CapID{pb.CapAnnotations, pb.CapSourceDateEpoch, pb.CapMultipleExporters, pb.CapGCFreeSpaceFilter} {
		require(def, id)
	}
	var in bytes.Buffer
	if err := llb.WriteTo(def, &in); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cmd := exec.Command(filepath.Join(env.peer, "buildctl"), "--addr", d.addr, "build", "--progress=plain",
		"--output", "type=oci,dest="+dir+"/oci.tar,annotation.who=we,source-date-epoch=1000000000", "--output", "type=local,dest="+dir)
	cmd.Stdin = &in
	runCommand(t, cmd).must(t)
	if got := readFile(t, dir, "f"); got != "x" {
		t.Errorf("the second output's file is %q", got)
	}
	l, _ := readArchive(t, filepath.Join(dir, "oci.tar"))
	if l.manifest.Annotations["who"] != "we" {
		t.Errorf("annotations %v", l.manifest.Annotations)
	}
	if l.config.Created == nil || l.config.Created.Unix() > 1e9 {
		t.Errorf("created %v, after the epoch", l.config.Created)
	}

	records := func() int { return strings.Count(d.buildctl("du", "--verbose").must(t).stdout, "ID:") }
	before := records()
	d.buildctl("prune", "--all", "--free-storage", "1").must(t)
	if got := records(); got != before || before == 0 {
		t.Errorf("%d records of %d are left though there is enough room", got, before)
	}
	d.buildctl("prune", "--all", "--free-storage", "1000000000").must(t)
	if got := records(); got != 0 {
		t.Errorf("%d records are left though there is too little room", got)
	}
}
