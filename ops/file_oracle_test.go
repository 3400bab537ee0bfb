package ops

import (
	"context"
	"fmt"
	"math/rand"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/continuity/fs"
	"github.com/moby/buildkit/solver/pb"
	fscopy "github.com/tonistiigi/fsutil/copy"
	"golang.org/x/sys/unix"
)

// fileOracle copies as the peer does, with the library that it uses.
func fileOracle(src, dst string, a *pb.FileActionCopy, owner *fileIDs) error {
	from, to := fileCleanPath(a.Src), fileCleanPath(a.Dest)
	if !a.CreateDestPath {
		p, err := fs.RootPath(dst, filepath.Join("/", a.Dest))
		if err != nil {
			return err
		}
		if _, err := os.Lstat(filepath.Dir(p)); err != nil {
			return err
		}
	}
	opt := func(ci *fscopy.CopyInfo) {
		ci.IncludePatterns, ci.ExcludePatterns = a.IncludePatterns, a.ExcludePatterns
		ci.Chown = func(old *fscopy.User) (*fscopy.User, error) {
			if owner == nil {
				return old, nil
			}
			return &fscopy.User{UID: owner.uid, GID: owner.gid}, nil
		}
		if a.Timestamp != -1 {
			tm := time.Unix(0, a.Timestamp)
			ci.Utime = &tm
		}
		if a.ModeStr != "" {
			ci.ModeStr = a.ModeStr
		} else if m := int(a.Mode); m != -1 {
			ci.Mode = &m
		}
		ci.CopyDirContents, ci.FollowLinks = a.DirCopyContents, a.FollowSymlink
		ci.AlwaysReplaceExistingDestPaths = a.AlwaysReplaceExistingDestPaths
	}
	sources := []string{from}
	if a.AllowWildcard {
		var err error
		if sources, err = fscopy.ResolveWildcards(src, from, a.FollowSymlink); err != nil {
			return err
		}
		if len(sources) == 0 && !a.AllowEmptyWildcard {
			return fmt.Errorf("%s not found", from)
		}
	}
	for _, s := range sources {
		if err := fscopy.Copy(context.Background(), src, s, dst, to, opt, fscopy.AllowXAttrErrors); err != nil {
			return err
		}
	}
	return nil
}

const fileOracleSeeds = 1500

var fileRandomNames = []string{"a", "b", "c", "d.go", "e.txt"}

func fileRandomTree(r *rand.Rand) fileTestTree {
	dirs, files, have := []string{""}, []string{}, map[string]bool{}
	var lines []string
	for range 4 + r.Intn(12) {
		p := path.Join(dirs[r.Intn(len(dirs))], fileRandomNames[r.Intn(len(fileRandomNames))])
		if have[p] {
			continue
		}
		have[p] = true
		owner := fmt.Sprintf("%d:%d", r.Intn(3), r.Intn(3))
		switch r.Intn(10) {
		case 0, 1, 2, 3:
			lines = append(lines, fmt.Sprintf("%s d %o %s", p, []int{0o755, 0o700, 0o2755, 0o1777}[r.Intn(4)], owner))
			dirs = append(dirs, p)
		case 4, 5:
			links := append([]string{"nowhere", "..", "/", ".", "../a", "/b", "a", "b/c", "/a/b", "../../c"}, dirs[1:]...)
			lines = append(lines, fmt.Sprintf("%s l 777 %s %s", p, owner, links[r.Intn(len(links))]))
		case 6:
			if len(files) > 0 {
				lines = append(lines, p+" h "+files[r.Intn(len(files))])
				continue
			}
			fallthrough
		case 7:
			lines = append(lines, fmt.Sprintf("%s %s %o %s", p, []string{"p", "c"}[r.Intn(2)], 0o640, owner))
		default:
			lines = append(lines, fmt.Sprintf("%s - %o %s c%d", p, []int{0o644, 0o600, 0o4755, 0o2711}[r.Intn(4)], owner, r.Intn(100)))
			files = append(files, p)
		}
	}
	return fileTestTree(strings.Join(lines, "\n"))
}

func fileRandomPath(r *rand.Rand, wildcards bool) string {
	var elems []string
	for range r.Intn(3) {
		e := fileRandomNames[r.Intn(len(fileRandomNames))]
		if wildcards && r.Intn(3) == 0 {
			e = []string{"*", "?", "*.go", "[a-c]", "a*", "[^x]*"}[r.Intn(6)]
		}
		if r.Intn(12) == 0 {
			e = ".."
		}
		elems = append(elems, e)
	}
	p := strings.Join(elems, "/") + []string{"", "", "", "/", "/."}[r.Intn(5)]
	if r.Intn(5) > 0 {
		p = "/" + p
	}
	return p
}

func fileRandomCopy(r *rand.Rand) (*pb.FileActionCopy, *fileIDs) {
	flag := func(of int) bool { return r.Intn(of) == 0 }
	a := &pb.FileActionCopy{
		Mode: -1, Timestamp: -1,
		FollowSymlink: flag(2), DirCopyContents: flag(2), CreateDestPath: !flag(8),
		AllowWildcard: flag(2), AllowEmptyWildcard: !flag(4), AlwaysReplaceExistingDestPaths: flag(3),
	}
	a.Src, a.Dest = fileRandomPath(r, a.AllowWildcard), fileRandomPath(r, false)
	patterns := func() []string {
		all := []string{"a", "*", "**", "*/b", "**/*.go", "b", "!a/b", "a/**", "c/*", "**/c", "!**/d.go", "a/b/c"}
		out := []string{all[r.Intn(len(all))]}
		if flag(2) {
			out = append(out, all[r.Intn(len(all))])
		}
		return out
	}
	if flag(3) {
		a.IncludePatterns = patterns()
	}
	if flag(3) {
		a.ExcludePatterns = patterns()
	}
	if flag(4) {
		a.Timestamp = int64(fileTestTime+5000+r.Intn(100)) * 1e9
	}
	switch r.Intn(6) {
	case 0:
		a.Mode = int32([]int{0o600, 0o4750, 0o2777, 0}[r.Intn(4)])
	case 1:
		a.ModeStr = []string{"u+X", "g=u", "a-w,u+s", "go=", "+t", "u=rwX,go=rX"}[r.Intn(6)]
	}
	if flag(4) {
		return a, &fileIDs{7, 8}
	}
	return a, nil
}

// Every copy rule, against the library that the peer uses, on random trees with
// random options: the same files, owners, modes, links and times, and errors in
// the same cases.
//
// compat: LLB-067, LLB-068, LLB-069, LLB-070, LLB-072, LLB-073, LLB-074, LLB-076, LLB-077
func TestFileCopyIsUpstreams(t *testing.T) {
	fileUmask() // must be known before it changes
	old := unix.Umask(0)
	t.Cleanup(func() { unix.Umask(old) })
	fscopy.UmaskIsZero = true // as the peer's daemon runs
	failed, same := 0, 0
	for seed := range int64(fileOracleSeeds) {
		r := rand.New(rand.NewSource(seed))
		srcTree, dstTree := fileRandomTree(r), fileRandomTree(r)
		a, owner := fileRandomCopy(r)
		if strings.HasSuffix(a.Dest, "/.") && strings.Contains(string(dstTree), " l ") {
			continue // the peer resolves "/." behind a link to a link wrongly
		}
		src, ours, theirs := srcTree.make(t), dstTree.make(t), dstTree.make(t)

		wantErr := fileOracle(src, theirs, a, owner)
		c, err := newFileCopy(fileTestRoot(t, src), fileTestRoot(t, ours), a, owner)
		if err == nil {
			err = c.run(t.Context())
		}
		report := func(what string, got, want any) {
			t.Errorf("seed %d: %s\ncopy %v owner %v\nfrom\n%s\nonto\n%s\ngot %v\nwant %v", seed, what, a, owner, srcTree, dstTree, got, want)
		}
		if wantErr != nil && err == nil && len(a.IncludePatterns)+len(a.ExcludePatterns) > 0 && strings.Contains(wantErr.Error(), "failed to stat") {
			// The peer looks for the destination also of what isn't copied, and
			// stumbles over a file where that has a directory.
			continue
		}
		if wantErr != nil && err == nil && a.AlwaysReplaceExistingDestPaths && strings.Contains(wantErr.Error(), "cannot copy to non-directory") {
			// What is in the way of a directory above a match isn't replaced by
			// the peer, though the option says so.
			continue
		}
		if err != nil && a.AlwaysReplaceExistingDestPaths && strings.Contains(err.Error(), "the root directory can't be replaced") {
			continue // the peer removes the whole filesystem then
		}
		if (err == nil) != (wantErr == nil) {
			report("errors differ", err, wantErr)
			continue
		}
		if err != nil {
			failed++
			if strings.Contains(err.Error(), ours) || strings.Contains(err.Error(), src) || strings.Contains(err.Error(), "/proc/") {
				report("the error shows a path of the daemon", err, "none")
			}
			continue
		}
		same++
		// With patterns, the peer leaves directories on the way to a match with
		// the time of the copy; they get the source's here.
		times := len(a.IncludePatterns)+len(a.ExcludePatterns) == 0
		if got, want := fileTestDump(t, ours, times), fileTestDump(t, theirs, times); got != want {
			report("results differ", "\n"+got, "\n"+want)
		}
		if t.Failed() && seed > 200 {
			t.Fatal("enough")
		}
	}
	if failed < 100 || same < 400 {
		t.Errorf("only %d copies and %d failures were compared", same, failed)
	}
}
