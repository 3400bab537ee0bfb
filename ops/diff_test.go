package ops

import (
	"context"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/internal/files"
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
	"golang.org/x/sys/unix"
)

func (b *execBench) diff(lower, upper *cache.Ref, lowerIsInput, upperIsInput bool) solver.Result {
	b.t.Helper()
	op := &pb.DiffOp{Lower: &pb.LowerDiffInput{Input: -1}, Upper: &pb.UpperDiffInput{Input: -1}}
	var in []*cache.Ref
	if lowerIsInput {
		op.Lower.Input, in = int64(len(in)), append(in, lower)
	}
	if upperIsInput {
		op.Upper.Input, in = int64(len(in)), append(in, upper)
	}
	out, err := b.opOn(&pb.Op{Op: &pb.Op_Diff{Diff: op}}, len(in)).Exec(context.Background(), asker{}, results(in...))
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(out[0].Release)
	return out[0]
}

// compat: LLB-081, LLB-014
func TestDiff(t *testing.T) {
	b := newExecBench(t, nil)
	base := b.ref(nil, fileSet{"a": "1", "d/x": "1"})
	mid := b.ref(base, fileSet{"b": "2"})
	top := b.ref(mid, fileSet{"a": "3", "c": "3"})
	other := b.ref(nil, fileSet{"a": "1", "o": "1"})
	for _, c := range []struct {
		name           string
		lower, upper   *cache.Ref
		noLower, noUpp bool
		want           fileSet // nil is scratch
	}{
		{name: "nothing", noLower: true, noUpp: true},
		{name: "scratch inputs"},
		{name: "equal", lower: top, upper: top},
		{name: "from nothing", noLower: true, upper: mid, want: fileSet{"a": "1", "d/x": "1", "b": "2"}},
		{name: "from scratch", upper: mid, want: fileSet{"a": "1", "d/x": "1", "b": "2"}},
		{name: "one layer", lower: mid, upper: top, want: fileSet{"a": "3", "c": "3"}},
		{name: "two layers", lower: base, upper: top, want: fileSet{"a": "3", "b": "2", "c": "3"}},
		{name: "unrelated", lower: base, upper: other, want: fileSet{"o": "1"}},
		{name: "to nothing", lower: base, noUpp: true, want: fileSet{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := b.diff(c.lower, c.upper, !c.noLower, !c.noUpp)
			if c.want == nil {
				if got.ID() != scratchID {
					t.Errorf("the diff is %s, want scratch", got.ID())
				}
				return
			}
			// Times differ between the files of unrelated states.
			have := filesOf(t, got)
			if c.name == "unrelated" {
				delete(have, "a")
			}
			if !maps.Equal(have, c.want) {
				t.Errorf("the diff holds %v, want %v", have, c.want)
			}
		})
	}
	if got := b.diff(nil, mid, false, true); got.ID() != mid.ID() {
		t.Errorf("the diff from nothing is %s, want the upper input %s", got.ID(), mid.ID())
	}
}

func filesOf(t *testing.T, r solver.Result) fileSet {
	t.Helper()
	view, err := r.(Result).Ref.Open(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer view.Close()
	return tree(t, view.Path()+"/")
}

// Whatever two states hold: what lies between them, on top of the one, is the
// other.
//
// compat: LLB-081
func TestDiffOnLowerIsUpper(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			b := newExecBench(t, nil)
			r := rand.New(rand.NewPCG(seed, 1))
			lower, upper := b.randomRef(r), b.randomRef(r)
			diff := b.diff(lower, upper, true, true).(Result)
			merged, err := b.cache.Merge(context.Background(), []*cache.Ref{lower, diff.Ref}, cache.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer merged.Release()
			got, want := describe(t, merged), describe(t, upper)
			for p := range mergeKeys(got, want) {
				if got[p] != want[p] {
					t.Errorf("%s is %q, want %q", p, got[p], want[p])
				}
			}
		})
	}
}

func mergeKeys(a, b map[string]string) map[string]string {
	all := maps.Clone(a)
	maps.Copy(all, b)
	return all
}

// randomRef makes a state of a few names, so that two of them share many, as
// different things.
func (b *execBench) randomRef(r *rand.Rand) *cache.Ref {
	b.t.Helper()
	ref := commitRef(b.t, b.cache, nil, func(dir string) {
		b.randomDir(r, dir, 3)
		if err := unix.Setxattr(dir, "user.root", []byte(fmt.Sprint(r.IntN(2))), 0); err != nil {
			b.t.Fatal(err)
		}
	})
	b.t.Cleanup(ref.Release)
	return ref
}

func (b *execBench) randomDir(r *rand.Rand, dir string, depth int) {
	must := func(err error) {
		b.t.Helper()
		if err != nil {
			b.t.Fatal(err)
		}
	}
	var regular []string
	for _, name := range []string{"a", "b", "c", "d", "e"} {
		p := filepath.Join(dir, name)
		kind := r.IntN(8)
		switch {
		case kind == 0:
			continue
		case kind <= 3 && depth > 0:
			must(os.Mkdir(p, 0o700))
			b.randomDir(r, p, depth-1)
		case kind == 4:
			must(os.Symlink([]string{"x", "../y"}[r.IntN(2)], p))
		case kind == 5:
			must(unix.Mkfifo(p, 0o600))
		case kind == 6 && len(regular) > 0:
			must(os.Link(regular[r.IntN(len(regular))], p))
			continue
		default:
			must(os.WriteFile(p, []byte(strings.Repeat("x", r.IntN(3))+fmt.Sprint(r.IntN(3))), 0o600))
			regular = append(regular, p)
			if r.IntN(4) == 0 {
				must(unix.Setxattr(p, "user.test", []byte(fmt.Sprint(r.IntN(2))), 0))
			}
		}
		must(os.Lchown(p, r.IntN(2), r.IntN(2)))
		if kind != 4 {
			must(os.Chmod(p, []fs.FileMode{0o644, 0o755, 0o755 | fs.ModeSetuid}[r.IntN(3)]))
		}
		at := time.Unix(int64(1000+r.IntN(2)), int64(r.IntN(2)))
		ts := unix.NsecToTimespec(at.UnixNano())
		must(unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
	}
}

// describe gives all that counts of every path in ref. Names of one file are
// not compared: a diff may part them.
func describe(t *testing.T, ref *cache.Ref) map[string]string {
	t.Helper()
	view, err := ref.Open(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer view.Close()
	out := map[string]string{}
	root := view.Path() + "/"
	top, err := os.Open(root)
	if err != nil {
		t.Fatal(err)
	}
	defer top.Close()
	err = filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Lstat(p)
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		text := fmt.Sprintf("%v %d:%d", info.Mode(), st.Uid, st.Gid)
		switch {
		case info.Mode().IsRegular():
			dt, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			text += fmt.Sprintf(" %q", dt)
		case info.Mode()&fs.ModeSymlink != 0:
			link, err := os.Readlink(p)
			if err != nil {
				return err
			}
			text += " -> " + link
		}
		if p != root {
			text += " " + info.ModTime().UTC().String()
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		attrs := files.XattrsAt(int(top.Fd()), rel)
		keys, err := attrs.Names()
		if err != nil {
			return err
		}
		for _, key := range keys {
			if strings.HasPrefix(key, "trusted.overlay.") {
				continue // the snapshotter's own
			}
			value, _, err := attrs.Get(key)
			if err != nil {
				return err
			}
			text += " " + key + "=" + string(value)
		}
		out[rel] = text
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}
