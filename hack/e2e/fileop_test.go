//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/client/llb"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/apicaps"
)

// sample is a tree with a bit of everything that actions on files meet.
func sample() llb.State {
	return llb.Scratch().
		File(llb.Mkdir("/d/sub/deep", 0o755, llb.WithParents(true)).
			Mkdir("/d/empty", 0o700).
			Mkdir("/e", 0o777).
			Mkdir("/etc", 0o755)).
		File(llb.Mkfile("/d/a", 0o644, []byte("a")).
			Mkfile("/d/b.txt", 0o600, []byte("b"), llb.WithUIDGID(5, 6)).
			Mkfile("/d/sub/c.txt", 0o755, []byte("c")).
			Mkfile("/d/sub/deep/d.go", 0o644, []byte("d")).
			Mkfile("/f", 0o644, []byte("f")).
			Mkfile("/etc/passwd", 0o644, []byte("root:x:0:0::/:\nme:x:7:8::/:\n")).
			Mkfile("/etc/group", 0o644, []byte("root:x:0:\nus:x:9:\n"))).
		File(llb.Symlink("d", "/l").
			Symlink("/d/sub", "/abs").
			Symlink("../f", "/d/up").
			Symlink("nowhere", "/dangling"))
}

// fileCase is an action on the sample, which copies from another one.
type fileCase struct {
	name   string
	cap    apicaps.CapID // that it needs
	action func(src llb.State) *llb.FileAction
}

// upstreamDiffers are the cases in which upstream does something else, why kiln
// doesn't, and what its error is.
var upstreamDiffers = map[string]struct{ why, fails string }{
	"rm a link to nothing":  {why: "upstream asks whether the link leads anywhere, though it removes the link itself"},
	"rm links by pattern":   {why: "the same"},
	"required and missing":  {why: "upstream looks for required paths only when it computes content digests", fails: "not found"},
	"required and excluded": {why: "the same", fails: "not found"},
}

func fileActions() []fileCase {
	when := time.Unix(1e9, 5)
	cp := func(src, dest string, info llb.CopyInfo) func(llb.State) *llb.FileAction {
		return func(s llb.State) *llb.FileAction { return llb.Copy(s, src, dest, &info) }
	}
	do := func(a *llb.FileAction) func(llb.State) *llb.FileAction {
		return func(llb.State) *llb.FileAction { return a }
	}
	patterns := func(dest string, include, exclude, required []string) func(llb.State) *llb.FileAction {
		return cp("/d", dest, llb.CopyInfo{CopyDirContentsOnly: true, CreateDestPath: true, IncludePatterns: include, ExcludePatterns: exclude, RequiredPaths: required})
	}
	return []fileCase{
		{"mkdir", pb.CapFileBase, do(llb.Mkdir("/n", 0o750, llb.WithUser("me:us"), llb.WithCreatedTime(when)))},
		{"mkdir that exists", pb.CapFileBase, do(llb.Mkdir("/d", 0o700))},
		{"mkdir over a file", pb.CapFileBase, do(llb.Mkdir("/f", 0o700))},
		{"mkdir without parents", pb.CapFileBase, do(llb.Mkdir("/n/m", 0o700))},
		{"mkdir with parents", pb.CapFileBase, do(llb.Mkdir("/n/m/o", 0o711, llb.WithParents(true), llb.WithUIDGID(3, 4)))},
		{"mkdir through a link", pb.CapFileBase, do(llb.Mkdir("/l/n/m", 0o711, llb.WithParents(true)))},
		{"mkfile", pb.CapFileBase, do(llb.Mkfile("/n", 0o4711, []byte("new"), llb.WithUser("me")))},
		{"mkfile over a file", pb.CapFileBase, do(llb.Mkfile("/d/b.txt", 0o640, []byte("new")))},
		{"mkfile over a directory", pb.CapFileBase, do(llb.Mkfile("/d", 0o640, nil))},
		{"mkfile through a link", pb.CapFileBase, do(llb.Mkfile("/abs/n", 0o640, []byte("new")))},
		{"mkfile at a link", pb.CapFileBase, do(llb.Mkfile("/d/up", 0o640, []byte("new")))},
		{"mkfile at a link to nothing", pb.CapFileBase, do(llb.Mkfile("/dangling", 0o640, []byte("new")))},
		{"mkfile without a directory", pb.CapFileBase, do(llb.Mkfile("/n/m", 0o640, nil))},
		{"copy a file", pb.CapFileBase, cp("/d/a", "/n", llb.CopyInfo{})},
		{"copy a directory", pb.CapFileBase, cp("/d", "/n", llb.CopyInfo{})},
		{"copy a directory into another", pb.CapFileBase, cp("/d", "/e/", llb.CopyInfo{})},
		{"copy what a directory holds", pb.CapFileBase, cp("/d", "/e", llb.CopyInfo{CopyDirContentsOnly: true})},
		{"copy a link", pb.CapFileBase, cp("/l", "/n", llb.CopyInfo{})},
		{"copy what a link leads to", pb.CapFileBase, cp("/l", "/n", llb.CopyInfo{FollowSymlinks: true})},
		{"copy to a missing directory", pb.CapFileBase, cp("/f", "/x/y/z", llb.CopyInfo{})},
		{"copy to a new directory", pb.CapFileBase, cp("/f", "/x/y/z", llb.CopyInfo{CreateDestPath: true})},
		{"copy what is missing", pb.CapFileBase, cp("/none", "/n", llb.CopyInfo{})},
		{"copy by pattern", pb.CapFileBase, cp("/d/?*t*", "/e/", llb.CopyInfo{AllowWildcard: true})},
		{"copy by a pattern of nothing", pb.CapFileBase, cp("/d/*.c", "/e/", llb.CopyInfo{AllowWildcard: true})},
		{"copy nothing by pattern", pb.CapFileBase, cp("/d/*.c", "/e/", llb.CopyInfo{AllowWildcard: true, AllowEmptyWildcard: true})},
		{"copy with owner and mode", pb.CapFileBase, cp("/d", "/n", llb.CopyInfo{ChownOpt: ptr(llb.WithUser("me:us")), Mode: &llb.ChmodOpt{Mode: 0o2750}})},
		{"rm a file", pb.CapFileBase, do(llb.Rm("/f"))},
		{"rm a directory", pb.CapFileBase, do(llb.Rm("/d"))},
		{"rm what is missing", pb.CapFileBase, do(llb.Rm("/none"))},
		{"rm what may be missing", pb.CapFileBase, do(llb.Rm("/none", llb.WithAllowNotFound(true)))},
		{"rm everything", pb.CapFileBase, do(llb.Rm("/"))},
		{"actions in a row", pb.CapFileBase, func(s llb.State) *llb.FileAction {
			return llb.Rm("/d").Mkdir("/d", 0o755).Copy(s, "/d/sub", "/d/").Mkfile("/d/sub/n", 0o600, nil).Rm("/d/sub/c.txt")
		}},
		{"a copy of what an action made", pb.CapFileBase, func(s llb.State) *llb.FileAction {
			return llb.Copy(llb.Mkfile("/d/n", 0o600, []byte("new")).WithState(s), "/d", "/n")
		}},

		{"rm by pattern", pb.CapFileRmWildcard, do(llb.Rm("/d/*t*", llb.WithAllowWildcard(true)))},
		{"rm by a deep pattern", pb.CapFileRmWildcard, do(llb.Rm("/?/s*/*.txt", llb.WithAllowWildcard(true)))},
		{"rm by a pattern through a link", pb.CapFileRmWildcard, do(llb.Rm("/l/*.txt", llb.WithAllowWildcard(true)))},
		{"rm by a pattern of nothing", pb.CapFileRmWildcard, do(llb.Rm("/d/*.c", llb.WithAllowWildcard(true)))},
		{"rm nothing by pattern", pb.CapFileRmWildcard, do(llb.Rm("/d/*.c", llb.WithAllowWildcard(true), llb.WithAllowNotFound(true)))},
		{"rm links by pattern", pb.CapFileRmWildcard, do(llb.Rm("/[a-d]*", llb.WithAllowWildcard(true)))},

		{"rm a link", pb.CapFileRmNoFollowSymlink, do(llb.Rm("/l"))},
		{"rm a link with a slash", pb.CapFileRmNoFollowSymlink, do(llb.Rm("/l/"))},
		{"rm a link to nothing", pb.CapFileRmNoFollowSymlink, do(llb.Rm("/dangling"))},
		{"rm a link out of a directory", pb.CapFileRmNoFollowSymlink, do(llb.Rm("/d/up"))},
		{"rm through a link", pb.CapFileRmNoFollowSymlink, do(llb.Rm("/abs/c.txt"))},

		{"include", pb.CapFileCopyIncludeExcludePatterns, patterns("/n/", []string{"**/*.txt"}, nil, nil)},
		{"include a directory", pb.CapFileCopyIncludeExcludePatterns, patterns("/n/", []string{"sub"}, nil, nil)},
		{"include nothing", pb.CapFileCopyIncludeExcludePatterns, patterns("/n/", []string{"none*"}, nil, nil)},
		{"include what isn't excluded", pb.CapFileCopyIncludeExcludePatterns, patterns("/n/", []string{"sub", "*.txt"}, []string{"sub/deep"}, nil)},
		{"exclude", pb.CapFileCopyIncludeExcludePatterns, patterns("/n/", nil, []string{"**/*.txt", "empty"}, nil)},
		{"exclude with exceptions", pb.CapFileCopyIncludeExcludePatterns, patterns("/n/", nil, []string{"sub", "!sub/deep"}, nil)},
		{"exclude all", pb.CapFileCopyIncludeExcludePatterns, patterns("/n/", nil, []string{"*"}, nil)},
		{"include over what exists", pb.CapFileCopyIncludeExcludePatterns, patterns("/e", []string{"sub/*.txt"}, nil, nil)},

		{"required", pb.CapFileCopyRequiredPaths, patterns("/n/", []string{"**/*.txt"}, nil, []string{"/d/sub/c.txt", "/d/b.txt"})},
		{"required and missing", pb.CapFileCopyRequiredPaths, patterns("/n/", []string{"**/*.txt"}, nil, []string{"/d/sub/none.txt"})},
		{"required and excluded", pb.CapFileCopyRequiredPaths, patterns("/n/", []string{"**/*.txt"}, []string{"sub"}, []string{"/d/sub/c.txt"})},

		{"a directory over a file", pb.CapFileBase, cp("/d", "/f", llb.CopyInfo{CopyDirContentsOnly: true})},
		{"a directory in a file's place", pb.CapFileCopyAlwaysReplaceExistingDestPaths, cp("/d", "/f", llb.CopyInfo{CopyDirContentsOnly: true, AlwaysReplaceExistingDestPaths: true})},
		{"a file in a directory's place", pb.CapFileCopyAlwaysReplaceExistingDestPaths, func(s llb.State) *llb.FileAction {
			return llb.Mkdir("/o/a/b", 0o755, llb.WithParents(true)).Copy(s, "/d", "/o", &llb.CopyInfo{CopyDirContentsOnly: true, AlwaysReplaceExistingDestPaths: true})
		}},
		{"a link in a directory's place", pb.CapFileCopyAlwaysReplaceExistingDestPaths, func(s llb.State) *llb.FileAction {
			return llb.Mkdir("/o/up/b", 0o755, llb.WithParents(true)).Mkfile("/o/sub", 0o644, nil).Copy(s, "/d", "/o", &llb.CopyInfo{CopyDirContentsOnly: true, AlwaysReplaceExistingDestPaths: true})
		}},

		{"symlink", pb.CapFileSymlinkCreate, do(llb.Symlink("../any//where", "/d/n", llb.WithUser("me:us"), llb.WithCreatedTime(when)))},
		{"symlink through a link", pb.CapFileSymlinkCreate, do(llb.Symlink("x", "/l/n"))},
		{"symlink over a file", pb.CapFileSymlinkCreate, do(llb.Symlink("x", "/f"))},
		{"symlink over a link", pb.CapFileSymlinkCreate, do(llb.Symlink("x", "/l"))},
		{"symlink without a directory", pb.CapFileSymlinkCreate, do(llb.Symlink("x", "/none/n"))},
	}
}

func ptr[T any](v T) *T { return &v }

// Actions on files do what upstream's do, by definitions that require the
// capability for it.
//
// compat: LLB-060, LLB-062, LLB-063, LLB-064, LLB-065, LLB-066, LLB-074, LLB-075, LLB-076
// compat: LLB-C64, LLB-C65, LLB-C66, LLB-C67, LLB-C68, LLB-C69, LLB-C70
func TestFileActionsAsUpstream(t *testing.T) {
	d := newDaemon(t)
	peer := peerDaemon(t)
	for _, c := range fileActions() {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			def, err := sample().File(c.action(sample())).Marshal()
			if err != nil {
				t.Fatal(err)
			}
			require(def, c.cap)
			ours, err := tarOfDefinition(t, d.addr, def)
			if x, ok := upstreamDiffers[c.name]; ok {
				if (err != nil) != (x.fails != "") || err != nil && !strings.Contains(err.Error(), x.fails) {
					t.Errorf("error %v, want %q: %s", err, x.fails, x.why)
				}
				if _, there := ours["dangling"]; there {
					t.Errorf("the link is still there: %s", x.why)
				}
				return
			}
			theirs, perr := tarOfDefinition(t, peer, def)
			if (err == nil) != (perr == nil) {
				t.Fatalf("kiln: %v\nupstream: %v", err, perr)
			}
			if err == nil {
				if diff := difference(ours, theirs); diff != "" {
					t.Error(diff)
				}
			}
		})
	}
}

// require has all of def require the capability.
func require(def *pb.Definition, c apicaps.CapID) {
	for _, md := range def.Metadata {
		if md.Caps == nil {
			md.Caps = map[string]bool{}
		}
		md.Caps[string(c)] = true
	}
}

func tarOfDefinition(t *testing.T, addr string, def *pb.Definition) (map[string]string, error) {
	t.Helper()
	out, err := exportDefinition(t, addr, def, "type=tar")
	if err != nil {
		return nil, err
	}
	files, err := describeTar(out)
	if err == nil && len(files) == 0 {
		return nil, fmt.Errorf("the tar is empty")
	}
	return files, err
}
