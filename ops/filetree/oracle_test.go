package filetree

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
	"github.com/kilnbuild/kiln/ops/filetree/treetest"
	fscopy "github.com/tonistiigi/fsutil/copy"
	"golang.org/x/sys/unix"
)

// oracleCopy is a Copy with what its Chmod was made of.
type oracleCopy struct {
	*Copy
	bits *int
	expr string
}

// asPeer copies as the peer does, with the library that it uses.
func (a oracleCopy) asPeer(src, dst string) error {
	from, to := cleanPath(a.Src), cleanPath(a.Dest)
	if !a.MakeParents {
		p, err := fs.RootPath(dst, filepath.Join("/", a.Dest))
		if err != nil {
			return err
		}
		if _, err := os.Lstat(filepath.Dir(p)); err != nil {
			return err
		}
	}
	opt := func(ci *fscopy.CopyInfo) {
		ci.IncludePatterns, ci.ExcludePatterns = a.Include, a.Exclude
		ci.Chown = func(old *fscopy.User) (*fscopy.User, error) {
			if o := a.Stamp.Owner; o != nil {
				return &fscopy.User{UID: o.UID, GID: o.GID}, nil
			}
			return old, nil
		}
		if ts := a.Stamp.Time; ts != nil {
			tm := time.Unix(ts.Unix())
			ci.Utime = &tm
		}
		ci.ModeStr, ci.Mode = a.expr, a.bits
		ci.CopyDirContents, ci.FollowLinks = a.Contents, a.FollowLinks
		ci.AlwaysReplaceExistingDestPaths = a.Replace
	}
	sources := []string{from}
	if a.Wildcards {
		var err error
		if sources, err = fscopy.ResolveWildcards(src, from, a.FollowLinks); err != nil {
			return err
		}
		if len(sources) == 0 && !a.AllowNone {
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

const oracleSeeds = 1500

var randomNames = []string{"a", "b", "c", "d.go", "e.txt"}

func randomTree(r *rand.Rand) treetest.Tree {
	dirs, files, have := []string{""}, []string{}, map[string]bool{}
	var lines []string
	for range 4 + r.Intn(12) {
		p := path.Join(dirs[r.Intn(len(dirs))], randomNames[r.Intn(len(randomNames))])
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
	return treetest.Tree(strings.Join(lines, "\n"))
}

func randomPath(r *rand.Rand, wildcards bool) string {
	var elems []string
	for range r.Intn(3) {
		e := randomNames[r.Intn(len(randomNames))]
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

func randomCopy(r *rand.Rand) oracleCopy {
	flag := func(of int) bool { return r.Intn(of) == 0 }
	a := oracleCopy{Copy: &Copy{
		FollowLinks: flag(2), Contents: flag(2), MakeParents: !flag(8),
		Wildcards: flag(2), AllowNone: !flag(4), Replace: flag(3),
	}}
	a.Src, a.Dest = randomPath(r, a.Wildcards), randomPath(r, false)
	patterns := func() []string {
		all := []string{"a", "*", "**", "*/b", "**/*.go", "b", "!a/b", "a/**", "c/*", "**/c", "!**/d.go", "a/b/c"}
		out := []string{all[r.Intn(len(all))]}
		if flag(2) {
			out = append(out, all[r.Intn(len(all))])
		}
		return out
	}
	if flag(3) {
		a.Include = patterns()
	}
	if flag(3) {
		a.Exclude = patterns()
	}
	if flag(4) {
		a.Stamp.Time = &unix.Timespec{Sec: int64(treetest.Time + 5000 + r.Intn(100))}
	}
	switch r.Intn(6) {
	case 0:
		bits := []int{0o600, 0o4750, 0o2777, 0}[r.Intn(4)]
		a.bits, a.Chmod = &bits, ChmodTo(uint32(bits))
	case 1:
		a.expr = []string{"u+X", "g=u", "a-w,u+s", "go=", "+t", "u=rwX,go=rX"}[r.Intn(6)]
		var err error
		if a.Chmod, err = ParseChmod(a.expr); err != nil {
			panic(err)
		}
	}
	if flag(4) {
		a.Stamp.Owner = &Owner{7, 8}
	}
	return a
}

// Every copy rule, against the library that the peer uses, on random trees with
// random options: the same files, owners, modes, links and times, and errors in
// the same cases.
//
// compat: LLB-067, LLB-068, LLB-069, LLB-070, LLB-072, LLB-073, LLB-074, LLB-076, LLB-077
func TestCopyIsUpstreams(t *testing.T) {
	processUmask() // must be known before it changes
	old := unix.Umask(0)
	t.Cleanup(func() { unix.Umask(old) })
	fscopy.UmaskIsZero = true // as the peer's daemon runs
	failed, same := 0, 0
	for seed := range int64(oracleSeeds) {
		r := rand.New(rand.NewSource(seed))
		srcTree, dstTree := randomTree(r), randomTree(r)
		a := randomCopy(r)
		if strings.HasSuffix(a.Dest, "/.") && strings.Contains(string(dstTree), " l ") {
			continue // the peer resolves "/." behind a link to a link wrongly
		}
		src, ours, theirs := srcTree.Make(t), dstTree.Make(t), dstTree.Make(t)

		wantErr := a.asPeer(src, theirs)
		err := doCopy(t, src, ours, a.Copy)
		report := func(what string, got, want any) {
			t.Errorf("seed %d: %s\ncopy %+v\nfrom\n%s\nonto\n%s\ngot %v\nwant %v", seed, what, *a.Copy, srcTree, dstTree, got, want)
		}
		if wantErr != nil && err == nil && len(a.Include)+len(a.Exclude) > 0 && strings.Contains(wantErr.Error(), "failed to stat") {
			// The peer looks for the destination also of what isn't copied, and
			// stumbles over a file where that has a directory.
			continue
		}
		if wantErr != nil && err == nil && a.Replace && strings.Contains(wantErr.Error(), "cannot copy to non-directory") {
			// What is in the way of a directory above a match isn't replaced by
			// the peer, though the option says so.
			continue
		}
		if err != nil && a.Replace && strings.Contains(err.Error(), "the root directory can't be replaced") {
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
		times := len(a.Include)+len(a.Exclude) == 0
		if got, want := treetest.Dump(t, ours, times), treetest.Dump(t, theirs, times); got != want {
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
