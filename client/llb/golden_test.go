package llb

import (
	"encoding/json"
	"net"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const emptyDigest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

// goldenGraphs builds the graphs whose op digests testdata/ops.json holds.
func goldenGraphs(t *testing.T) map[string]State {
	bb := Image("busybox")
	tm := time.Unix(1700000000, 5).UTC()
	src := Local("src", SessionID("sess"), IncludePatterns([]string{"a", "b*"}), ExcludePatterns([]string{"c"}),
		FollowPaths([]string{"d"}), SharedKeyHint("hint"), Differ(DiffNone, false), WithCustomName("x"))
	g := map[string]State{}

	g["image"] = Image("docker.io/library/alpine:3.20", ResolveModeForcePull, WithCustomName("hi"))
	g["image-opts"] = Image("alpine@"+emptyDigest, MarkImageInternal, Require("a", "b"),
		Platform(ocispec.Platform{OS: "linux", Architecture: "arm", Variant: "v7", OSVersion: "1", OSFeatures: []string{"f"}}))
	g["local"] = src
	g["local-unique"] = Local("src", MetadataOnlyTransfer([]string{"x"}), Differ(DiffMetadata, true))
	g["oci"] = OCILayout("foo@"+emptyDigest, OCIStore("sess", "store"), OCILayerLimit(2))
	g["http"] = HTTP("https://example.com/x.tar", Filename("f"), Chmod(0o640), Chown(1, 2), Checksum(emptyDigest),
		AuthHeaderSecret("sec"), Header("a/b", "ua"))
	g["blob"] = ImageBlob("foo@"+emptyDigest, Filename("f"), Chmod(0o640), Chown(1, 2))
	g["git"] = Git("https://github.com/moby/buildkit.git", "v0.11:sub/dir", KeepGitDir(), GitSkipSubmodules(),
		GitChecksum("abc"), GitMTime("commit"), GitFetchByCommit())
	g["git-scheme"] = Git("github.com/moby/buildkit", "main", AuthTokenSecret("tok"))
	g["git-ssh"] = Git("git@github.com:moby/buildkit.git", "", KnownSSHHosts("github.com ssh-rsa AAA"), MountSSHSock("id"), GitRef("r"))

	g["run"] = bb.Run(Shlex(`sh -c "echo hi"`), AddEnv("A", "1"), Dir("/x"), With(Dir("y")), User("me:grp")).Root().
		AddEnv("B", "2").AddEnv("C", "3").AddEnv("B", "4").Dir("rel").Hostname("h").
		Run(Args([]string{"true"}), AddExtraHost("foo", net.ParseIP("1.2.3.4")), AddUlimit("nofile", 1, 2), WithCgroupParent("cg"),
			Network(NetModeHost), Security(SecurityModeInsecure), ValidExitCodes(1, 0), WithProxy(ProxyEnv{HTTPProxy: "p", AllProxy: "q"}),
			IgnoreCache, WithLinuxResources(LinuxResources{Memory: 1, CPUShares: 2}), AddCDIDevice("v/c=d", true)).Root()

	e := bb.Run(Args([]string{"a", "b"}),
		AddMount("/src", src, Readonly, SourcePath("/sub")),
		AddMount("/src2", src, ForceNoOutput),
		AddMount("/cache", Scratch(), AsPersistentCacheDir("id", CacheMountLocked)),
		AddMount("/cache2", bb, AsPersistentCacheDir("id2", CacheMountPrivate)),
		AddMount("/tmp", Scratch(), Tmpfs(1000)),
		AddMount("/b", bb, ContentCache(MountContentCacheOff)),
		AddSecret("/run/x", SecretOptional, SecretFileOpt(1, 2, 0o444)),
		AddSecret("/run/secrets/foo", SecretID("foo"), SecretAsEnvName("KEY")),
		AddSecretEnv("bar", "BAR"),
		AddSSHSocket(SSHID("default")),
		AddSSHSocket(SSHID("other"), SSHOptional, SSHSocketOpt("/sock", 3, 4, 0o666)),
	)
	out := e.AddMount("/out", Scratch())
	g["mounts"] = e.Root()
	g["mounts-out"] = out.File(Copy(e.GetMount("/b"), "/x", "/y"))
	g["readonly-root"] = bb.Run(Args([]string{"a"}), ReadonlyRootFS(),
		Platform(ocispec.Platform{OS: "linux", Architecture: "arm64"})).AddMount("/out", Scratch())

	g["file"] = bb.Dir("/w").File(Mkdir("a", 0o755, WithParents(true), WithUser("u:7"), WithCreatedTime(tm)).
		Mkfile("b/../c", 0o644, []byte("data"), WithUIDGID(1, 2)).
		Symlink("old", "/new", WithUser("root")).
		Rm("/x*", WithAllowNotFound(true), WithAllowWildcard(true)).
		Copy(src.Dir("/in"), "p/./q", "dst/", &CopyInfo{
			Mode: &ChmodOpt{Mode: 0o4755}, FollowSymlinks: true, CopyDirContentsOnly: true,
			IncludePatterns: []string{"i"}, ExcludePatterns: []string{"e"}, RequiredPaths: []string{"r"},
			AttemptUnpack: true, CreateDestPath: true, AllowWildcard: true, AllowEmptyWildcard: true,
			AlwaysReplaceExistingDestPaths: true,
		}, WithUser("x:y"), WithCreatedTime(tm)).
		Copy(bb, "/p", "/dst/.", ChmodOpt{ModeStr: "u+x"}, WithExcludePatterns([]string{"z"})))
	both := Mkdir("/d", 0o700).Mkfile("/d/f", 0o600, []byte("x")).WithState(Scratch().Dir("/q"))
	g["file-graph"] = Scratch().File(Mkfile("/start", 0o600, nil).Copy(both, "rel", "/one").Copy(both, "/abs", "/two"))
	g["file-scratch"] = Scratch().File(Mkfile("/f", 0o600, []byte("x"), WithUser("nobody")))

	a := bb.File(Mkfile("/a", 0o644, []byte("a")))
	b := bb.File(Mkfile("/b", 0o644, []byte("b")))
	g["merge"] = Merge([]State{a, Scratch(), Diff(bb, b), Diff(a, Scratch()), a}, WithCustomName("m"))
	g["passthrough"] = a.Requires("id", []State{b, Scratch()})
	g["twice"] = bb.File(Mkfile("/a", 0o644, nil), WithCustomName("1")).
		File(Copy(Image("busybox:latest", WithDescription(map[string]string{"k": "v"})), "/", "/"), WithoutExportCache())

	st, err := Scratch().WithImageConfig([]byte(`{"architecture":"arm64","os":"linux","config":{"Env":["A=b","C","=x"],"WorkingDir":"/wd"}}`))
	if err != nil {
		t.Fatal(err)
	}
	g["image-config"] = st.Run(Args([]string{"x"})).Root().File(Mkdir("z", 0o700))
	return g
}

// TestGolden compares with the digests that the reference implementation gives
// to the same graphs, and that every capability it demands is demanded.
//
// compat: LLB-001
func TestGolden(t *testing.T) {
	dt, err := os.ReadFile("testdata/ops.json")
	if err != nil {
		t.Fatal(err)
	}
	var want map[string]struct {
		Ops  []string
		Head string
		Caps map[string][]string
	}
	if err := json.Unmarshal(dt, &want); err != nil {
		t.Fatal(err)
	}
	graphs := goldenGraphs(t)
	if len(graphs) != len(want) {
		t.Errorf("%d graphs built, %d recorded", len(graphs), len(want))
	}
	for name, w := range want {
		t.Run(name, func(t *testing.T) {
			st, ok := graphs[name]
			if !ok {
				t.Fatal("not built")
			}
			def, err := st.Marshal(LinuxAmd64, LocalUniqueID("uid"))
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, dt := range def.Def {
				got = append(got, digest.FromBytes(dt).String())
			}
			head, ops := got[len(got)-1], got[:len(got)-1]
			slices.Sort(ops)
			if !slices.Equal(ops, w.Ops) {
				t.Errorf("ops %v, want %v\n%s", ops, w.Ops, dump(t, def))
			}
			if head != w.Head {
				t.Errorf("head %s, want %s", head, w.Head)
			}
			for dgst, caps := range w.Caps {
				for _, c := range caps {
					if !def.Metadata[dgst].GetCaps()[c] {
						t.Errorf("op %s doesn't demand %s", dgst, c)
					}
				}
			}
		})
	}
}

func dump(t *testing.T, def *pb.Definition) string {
	var out string
	for _, dt := range def.Def {
		var op pb.Op
		if err := op.UnmarshalVT(dt); err != nil {
			t.Fatal(err)
		}
		out += digest.FromBytes(dt).String() + " " + op.String() + "\n"
	}
	return out
}
