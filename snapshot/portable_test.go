package snapshot_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/kilnbuild/kiln/internal/store"
	"github.com/kilnbuild/kiln/snapshot"
	"github.com/kilnbuild/kiln/snapshot/snapshottest"
	"golang.org/x/sys/unix"
)

// unpack lays the tars of layers over one another in a plain directory, with
// containerd's unpacker, and describes what is there.
func unpack(t *testing.T, s snapshot.Snapshotter, layers []string) []string {
	t.Helper()
	dir := t.TempDir()
	for _, id := range layers {
		_, err := archive.Apply(t.Context(), dir, bytes.NewReader(diffOf(t, s, id)))
		must(t, err)
	}
	return withoutRoot(tree(t, dir, false))
}

// withoutRoot leaves the root itself out, which isn't part of layers.
func withoutRoot(tree []string) []string {
	return slices.DeleteFunc(tree, func(line string) bool { return strings.HasPrefix(line, "/ ") })
}

// What a layer means where its parent isn't below it.
func TestStackAbroad(t *testing.T) {
	for _, c := range []struct {
		name                 string
		base, change, abroad func(t *testing.T, dir string)
		want                 string
		copied               bool
	}{
		{
			name:   "new files",
			base:   func(t *testing.T, dir string) { writeFile(t, dir+"/d/x", "1") },
			change: func(t *testing.T, dir string) { writeFile(t, dir+"/d/y", "2") },
			abroad: func(t *testing.T, dir string) { writeFile(t, dir+"/d/z", "3") },
			want:   "d/ d/y=2 d/z=3",
		},
		{
			name:   "deletions",
			base:   func(t *testing.T, dir string) { writeFile(t, dir+"/d/x", "1"); writeFile(t, dir+"/e/x", "1") },
			change: func(t *testing.T, dir string) { must(t, os.RemoveAll(dir+"/d")); must(t, os.Remove(dir+"/e/x")) },
			abroad: func(t *testing.T, dir string) {
				writeFile(t, dir+"/d/q", "3")
				writeFile(t, dir+"/e/x", "3")
				writeFile(t, dir+"/e/y", "3")
			},
			want: "e/ e/y=3",
		},
		{
			name: "a directory in a directory's place",
			base: func(t *testing.T, dir string) { writeFile(t, dir+"/d/x", "1"); writeFile(t, dir+"/d/sub/y", "1") },
			change: func(t *testing.T, dir string) {
				must(t, os.RemoveAll(dir+"/d"))
				writeFile(t, dir+"/d/new", "2")
			},
			abroad: func(t *testing.T, dir string) {
				writeFile(t, dir+"/d/x", "3")
				writeFile(t, dir+"/d/kept", "3")
				writeFile(t, dir+"/d/sub/y", "3")
			},
			want:   "d/ d/kept=3 d/new=2",
			copied: true,
		},
		{
			name: "directories in directories in a directory's place",
			base: func(t *testing.T, dir string) { writeFile(t, dir+"/d/sub/x", "1"); writeFile(t, dir+"/d/sub/y", "1") },
			change: func(t *testing.T, dir string) {
				must(t, os.RemoveAll(dir+"/d"))
				writeFile(t, dir+"/d/sub/x", "2")
			},
			abroad: func(t *testing.T, dir string) {
				writeFile(t, dir+"/d/sub/x", "3")
				writeFile(t, dir+"/d/sub/y", "3")
				writeFile(t, dir+"/d/sub/z", "3")
			},
			want:   "d/ d/sub/ d/sub/x=2 d/sub/z=3",
			copied: true,
		},
		{
			name: "a directory in a file's place",
			base: func(t *testing.T, dir string) { writeFile(t, dir+"/d", "1") },
			change: func(t *testing.T, dir string) {
				must(t, os.Remove(dir+"/d"))
				writeFile(t, dir+"/d/new", "2")
			},
			abroad: func(t *testing.T, dir string) { writeFile(t, dir+"/d/kept", "3") },
			want:   "d/ d/kept=3 d/new=2",
			copied: true,
		},
		{
			name:   "a directory that was there shortly and is again elsewhere",
			base:   func(t *testing.T, dir string) { writeFile(t, dir+"/d/x", "1") },
			change: func(t *testing.T, dir string) { writeFile(t, dir+"/d/y", ""); must(t, os.Remove(dir+"/d/y")) },
			abroad: func(t *testing.T, dir string) { writeFile(t, dir+"/o", "3") },
			want:   "o=3",
			copied: true,
		},
		{
			name:   "a file that was touched",
			base:   func(t *testing.T, dir string) { writeFile(t, dir+"/d/x", "1") },
			change: func(t *testing.T, dir string) { must(t, os.Chmod(dir+"/d/x", 0o644)) },
			abroad: func(t *testing.T, dir string) { writeFile(t, dir+"/d/x", "3") },
			want:   "d/ d/x=3",
			copied: true,
		},
		{
			name: "a link to a file of the parent",
			base: func(t *testing.T, dir string) { writeFile(t, dir+"/d/x", "1"); writeFile(t, dir+"/e/x", "1") },
			change: func(t *testing.T, dir string) {
				must(t, os.Link(dir+"/d/x", dir+"/d/y"))
				must(t, os.RemoveAll(dir+"/e"))
				must(t, os.Mkdir(dir+"/e", 0o755))
			},
			abroad: func(t *testing.T, dir string) { writeFile(t, dir+"/d/x", "3"); writeFile(t, dir+"/e/x", "3") },
			want:   "d/ d/x=1 d/y=1 e/",
			copied: true,
		},
		{
			name:   "a file in a directory's place",
			base:   func(t *testing.T, dir string) { writeFile(t, dir+"/d/x", "1") },
			change: func(t *testing.T, dir string) { must(t, os.RemoveAll(dir+"/d")); writeFile(t, dir+"/d", "2") },
			abroad: func(t *testing.T, dir string) { writeFile(t, dir+"/d/q/r", "3") },
			want:   "d=2",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := newOverlay(t)
			makeLayer(t, o, "base", "", func(dir string) { c.base(t, dir) })
			makeLayer(t, o, "layer", "base", func(dir string) { c.change(t, dir) })
			makeLayer(t, o, "other", "", func(dir string) { c.abroad(t, dir) })
			blob := diffOf(t, o, "layer")
			before := treeOf(t, o, "layer")

			if grown := stack(t, o, "home", "base", "layer"); len(grown) > 0 {
				t.Error("a layer was copied to stand on its own parent")
			}
			grown := stack(t, o, "abroad", "other", "layer")
			if got := len(grown) > 0; got != c.copied {
				t.Errorf("copied: %v, want %v", got, c.copied)
			}
			if grown := stack(t, o, "alone", "layer"); len(grown) > 0 {
				t.Error("it was copied again")
			}
			if got := shown(t, o, "abroad"); got != c.want {
				t.Errorf("it shows %q, want %q", got, c.want)
			}
			sameTree(t, "abroad, and unpacked", withoutRoot(treeOf(t, o, "abroad")), unpack(t, o, []string{"other", "layer"}))
			sameTree(t, "alone, and unpacked", withoutRoot(treeOf(t, o, "alone")), unpack(t, o, []string{"layer"}))
			sameTree(t, "at home", treeOf(t, o, "home"), before)
			sameTree(t, "the layer itself", treeOf(t, o, "layer"), before)
			if !bytes.Equal(diffOf(t, o, "layer"), blob) {
				t.Error("the layer's blob is another")
			}
			if errs := o.Check(t.Context(), true); len(errs) > 0 {
				t.Error(errs)
			}
		})
	}
}

// Random layers, stacked in any order, show what their tars unpack to, and so do
// layers written on top of that.
func TestStackIsWhatTarsUnpackTo(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint("seed", seed), func(t *testing.T) {
			o := newOverlay(t)
			stackFew(o, seed)
			r := rand.New(rand.NewPCG(seed, 9))
			c := &changer{T: t, Rand: r}
			chains := map[string][]string{"": nil} // of every snapshot
			ids := []string{""}
			add := func(id string, chain []string) {
				ids, chains[id] = append(ids, id), chain
				sameTree(t, fmt.Sprintf("%s, of %q", id, chain), withoutRoot(treeOf(t, o, id)), unpack(t, o, chain))
			}
			for i := range 14 {
				id := fmt.Sprint("s", i)
				if i < 4 || r.IntN(3) == 0 {
					parent := ids[r.IntN(len(ids))]
					makeLayer(t, o, id, parent, func(dir string) { c.change(dir, 25) })
					add(id, append(slices.Clone(chains[parent]), id))
					continue
				}
				var layers []string
				for range 1 + r.IntN(3) { // a merge
					layers = append(layers, chains[ids[1+r.IntN(len(ids)-1)]]...)
				}
				layers = layers[r.IntN(len(layers)):] // a difference
				stack(t, o, id, layers...)
				add(id, layers)
			}
			if errs := o.Check(t.Context(), true); len(errs) > 0 {
				t.Fatal(errs)
			}
		})
	}
}

// stackFew has every third overlay make grounds early.
func stackFew(o *snapshot.Overlay, seed uint64) bool {
	if seed%3 == 2 {
		snapshot.StackAtMost(o, 2+int(seed)%2)
	}
	return seed%3 == 2
}

// prepareOn is Prepare on a parent with any number of layers.
func prepareOn(t testing.TB, o snapshot.Snapshotter, id, parent string) {
	t.Helper()
	if parent != "" {
		_, err := o.Ground(t.Context(), parent)
		must(t, err)
	}
	must(t, o.Prepare(t.Context(), id, parent))
}

// randomTar is a layer as other tools make them: sorted, with all directories, and
// with deletions in any place.
func randomTar(t *testing.T, r *rand.Rand) []byte {
	t.Helper()
	dirs, entries := map[string]bool{"": true}, map[string]tar.Header{}
	for range 3 + r.IntN(8) {
		at := ""
		for range r.IntN(3) {
			if _, taken := entries[at+string("abc"[r.IntN(3)])]; taken {
				break
			}
			at += string("abc"[r.IntN(3)]) + "/"
		}
		name := string("abc"[r.IntN(3)])
		for i := range at {
			if _, file := entries[at[:i]]; file {
				at = "" // what was to be a directory is a file
				break
			}
		}
		kind := r.IntN(6)
		if kind > 1 && dirs[at+name+"/"] {
			continue
		}
		for i, c := range at {
			if c == '/' {
				dirs[at[:i+1]] = true
			}
		}
		switch kind {
		case 0, 1:
			entries[at+".wh."+name] = tar.Header{}
		case 2:
			if at != "" || r.IntN(3) == 0 {
				entries[at+".wh..wh..opq"] = tar.Header{}
			}
		case 3:
			entries[at+name] = tar.Header{Typeflag: tar.TypeSymlink, Linkname: "b"}
		default:
			entries[at+name] = tar.Header{}
		}
	}
	delete(dirs, "")
	for d := range dirs {
		entries[d] = tar.Header{Typeflag: tar.TypeDir, Mode: int64([]int{0o755, 0o700}[r.IntN(2)])}
	}
	var headers []tar.Header
	for _, name := range slices.Sorted(maps.Keys(entries)) {
		h := entries[name]
		h.Name = name
		headers = append(headers, h)
	}
	return layerTar(t, headers...)
}

// The same for layers that were pulled, whatever they were unpacked onto: their
// deletions count wherever they are stacked.
func TestStackOfUnpackedLayers(t *testing.T) {
	for seed := range uint64(24) {
		t.Run(fmt.Sprint("seed", seed), func(t *testing.T) {
			o := newOverlay(t)
			few := stackFew(o, seed)
			r := rand.New(rand.NewPCG(seed, 11))
			tars, chains, ids := map[string][]byte{}, map[string][]string{"": nil}, []string{""}
			check := func(id string) {
				t.Helper()
				dir := t.TempDir()
				var all []string
				for _, l := range chains[id] {
					_, err := archive.Apply(t.Context(), dir, bytes.NewReader(tars[l]))
					must(t, err)
					all = append(all, l+": "+entries(t, tars[l]))
				}
				sameTree(t, id+", of\n"+strings.Join(all, "\n"), withoutRoot(treeOf(t, o, id)), withoutRoot(tree(t, dir, false)))
			}
			for i := range 16 {
				id := fmt.Sprint("s", i)
				ids = append(ids, id)
				if i < 6 || r.IntN(4) == 0 {
					parent := ids[r.IntN(2)*r.IntN(len(ids)-1)]
					tars[id] = randomTar(t, r)
					prepareOn(t, o, id, parent)
					must(t, snapshot.Apply(t.Context(), o, id, bytes.NewReader(tars[id])))
					must(t, o.Commit(t.Context(), id))
					chains[id] = append(slices.Clone(chains[parent]), id)
				} else {
					var layers []string
					for range 1 + r.IntN(3) {
						layers = append(layers, chains[ids[1+r.IntN(len(ids)-2)]]...)
					}
					chains[id] = layers[r.IntN(len(layers)):]
					if grown := stack(t, o, id, chains[id]...); len(grown) > 0 && !few {
						t.Error("a layer that is as its tar was copied")
					}
				}
			}
			for _, id := range ids[1:] {
				check(id)
			}
		})
	}
}

// A copy counts once the layer has it; one that a crash left, before its record was
// stored, is nobody's.
func TestUsageOfACopy(t *testing.T) {
	snapshottest.Root(t)
	root := t.TempDir()
	o := openOverlay(t, root, snapshottest.OpenDB(t, root))
	t.Cleanup(func() { must(t, o.Close()) })
	opaqueLayer(t, o)
	usage := func() int64 {
		t.Helper()
		u, err := o.Usage(t.Context(), "layer")
		must(t, err)
		return u.Size
	}
	own := usage()
	writeFile(t, copyDir(o, "layer")+"/d/new", "left")
	if got := usage(); got != own {
		t.Errorf("with what a crash left it takes %d bytes, not %d", got, own)
	}
	must(t, os.RemoveAll(copyDir(o, "layer")))
	stack(t, o, "stack", "other", "layer")
	if got := usage(); got <= own {
		t.Errorf("with a copy it takes %d bytes, and %d without", got, own)
	}
}

// opaqueLayer makes a layer that has to be copied to stand on other.
func opaqueLayer(t *testing.T, o *snapshot.Overlay) {
	makeLayer(t, o, "base", "", func(dir string) { writeFile(t, dir+"/d/x", "1"); writeFile(t, dir+"/big", strings.Repeat("b", 1<<20)) })
	makeLayer(t, o, "layer", "base", func(dir string) {
		must(t, os.RemoveAll(dir+"/d"))
		writeFile(t, dir+"/d/new", strings.Repeat("n", 1<<20))
	})
	makeLayer(t, o, "other", "", func(dir string) { writeFile(t, dir+"/d/kept", "3") })
}

func copyDir(o *snapshot.Overlay, id string) string {
	return strings.TrimSuffix(layerDir(o, id), id+"/fs") + "+" + id
}

func reopenableDB(t *testing.T, root string) *store.DB {
	t.Helper()
	db, err := store.Open(store.Options{Root: root})
	must(t, err)
	return db
}

func TestPortableCopyLivesWithItsLayer(t *testing.T) {
	root := t.TempDir()
	db := reopenableDB(t, root)
	o := openOverlay(t, root, db)
	opaqueLayer(t, o)
	before, err := o.Usage(t.Context(), "layer")
	must(t, err)
	if grown := stack(t, o, "st", "other", "layer"); !slices.Equal(grown, []string{"layer"}) {
		t.Fatalf("grown: %q", grown)
	}
	after, err := o.Usage(t.Context(), "layer")
	must(t, err)
	if after.Size <= before.Size || after.Size > before.Size+64<<10 || after.Linked {
		t.Errorf("it took %+v, and with its copy %+v", before, after)
	}
	want := shown(t, o, "st")
	b := &store.Batch{}
	must(t, o.Persist(b, "st"))
	must(t, o.Persist(b, "layer"))
	db.Write(b)
	// One that nobody has a record of.
	must(t, os.Mkdir(copyDir(o, "other"), 0o700))
	must(t, o.Close())
	must(t, db.Close())

	db = reopenableDB(t, root)
	defer func() { must(t, errors.Join(o.Close(), db.Close())) }()
	o = openOverlay(t, root, db)
	if n, err := o.Sweep(t.Context()); n != 1 || err != nil {
		t.Errorf("swept %d, want one copy without a record: %v", n, err)
	}
	if got := shown(t, o, "st"); got != want {
		t.Errorf("after a restart it shows %q, not %q", got, want)
	}
	if grown := stack(t, o, "st2", "layer", "other"); len(grown) > 0 {
		t.Error("it was copied again")
	}
	must(t, o.Persist(&store.Batch{}, "st2"))
	if errs := o.Check(t.Context(), true); len(errs) > 0 {
		t.Error(errs)
	}
	// Damage is found, and mended by who needs it.
	must(t, os.RemoveAll(copyDir(o, "layer")))
	if errs := o.Check(t.Context(), false); len(errs) != 1 || !strings.Contains(errs[0].Error(), "no copy for other parents") {
		t.Errorf("a missing copy: %v", errs)
	}
	o.ForgetLost()
	for id, want := range map[string]error{"layer": nil, "other": nil, "st": snapshot.ErrNotFound} {
		if _, err := o.Stat(t.Context(), id); !errors.Is(err, want) {
			t.Errorf("repaired, %s: %v, want %v", id, err, want)
		}
	}
	if errs := o.Check(t.Context(), true); len(errs) > 0 {
		t.Error(errs)
	}
	stack(t, o, "st", "other", "layer")
	must(t, os.RemoveAll(copyDir(o, "layer")))
	if grown := stack(t, o, "st3", "other", "layer"); !slices.Equal(grown, []string{"layer"}) {
		t.Errorf("a missing copy wasn't made again: %q", grown)
	}
	if got := shown(t, o, "st"); got != want {
		t.Errorf("mended it shows %q, not %q", got, want)
	}
	b = &store.Batch{}
	for _, id := range []string{"st", "st3"} {
		must(t, o.Remove(b, id))
	}
	// What is written anew has no copy of what it was.
	must(t, o.Reopen(t.Context(), "layer"))
	if errs := o.Check(t.Context(), true); len(errs) > 0 {
		t.Error(errs)
	}
	must(t, o.Commit(t.Context(), "layer"))
	stack(t, o, "st4", "other", "layer")
	must(t, o.Remove(b, "st4"))
	must(t, o.Remove(b, "layer"))
	db.Write(b)
	must(t, db.Sync(t.Context()))
	must(t, o.Settle(t.Context()))
	if _, err := os.Lstat(copyDir(o, "layer")); !os.IsNotExist(err) {
		t.Errorf("the copy outlives its layer: %v", err)
	}
}

// A copy that fails leaves nothing, and the next attempt is as the first.
func TestPortableCopyFails(t *testing.T) {
	o := newOverlay(t)
	opaqueLayer(t, o)
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("not wanted any more")
	cancel(why)
	if _, err := o.Stack(ctx, "st", []string{"other", "layer"}); !errors.Is(err, why) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := o.Stat(t.Context(), "st"); !errors.Is(err, snapshot.ErrNotFound) {
		t.Errorf("the stack is there: %v", err)
	}
	if _, err := os.Lstat(copyDir(o, "layer")); !os.IsNotExist(err) {
		t.Errorf("a copy is there: %v", err)
	}
	stack(t, o, "st", "other", "layer")
	if got, want := shown(t, o, "st"), "d/ d/kept=3 d/new="; !strings.HasPrefix(got, want) {
		t.Errorf("it shows %.40q", got)
	}
	if errs := o.Check(t.Context(), true); len(errs) > 0 {
		t.Error(errs)
	}
}

// Stacks made at the same time share one copy.
func TestPortableCopyIsMadeOnce(t *testing.T) {
	o := newOverlay(t)
	opaqueLayer(t, o)
	const n = 8
	grown := make(chan int, n)
	for i := range n {
		go func() {
			g, err := o.Stack(t.Context(), fmt.Sprint("st", i), []string{"other", "layer"})
			if err != nil {
				t.Error(err)
			}
			grown <- len(g)
		}()
	}
	total := 0
	for range n {
		total += <-grown
	}
	if total != 1 {
		t.Errorf("it was copied %d times", total)
	}
}

// Processes that open a pipe of a layer don't meet those in another stack of it.
func TestPortableCopySharesNoPipes(t *testing.T) {
	o := newOverlay(t)
	makeLayer(t, o, "base", "", func(dir string) { writeFile(t, dir+"/d/x", "1") })
	makeLayer(t, o, "layer", "base", func(dir string) {
		must(t, os.RemoveAll(dir+"/d"))
		must(t, os.Mkdir(dir+"/d", 0o755))
		must(t, unix.Mkfifo(dir+"/d/pipe", 0o640))
		must(t, os.Chown(dir+"/d/pipe", 3, 4))
	})
	stack(t, o, "st", "layer")
	var a, b unix.Stat_t
	must(t, unix.Lstat(layerDir(o, "layer")+"/d/pipe", &a))
	must(t, unix.Lstat(copyDir(o, "layer")+"/d/pipe", &b))
	if a.Ino == b.Ino || a.Mode != b.Mode || a.Uid != b.Uid || a.Gid != b.Gid || a.Mtim != b.Mtim {
		t.Errorf("%+v was copied as %+v", a, b)
	}
}

func BenchmarkStackAbroad(b *testing.B) {
	for _, copied := range []bool{false, true} {
		b.Run(fmt.Sprint("copied=", copied), func(b *testing.B) {
			o := newOverlay(b)
			makeLayer(b, o, "base", "", func(dir string) { writeFile(b, dir+"/d00/x", "1") })
			n := 0
			for b.Loop() {
				b.StopTimer()
				id := fmt.Sprint("l", n)
				n++
				makeLayer(b, o, id, "base", func(dir string) {
					if copied {
						must(b, os.RemoveAll(dir+"/d00"))
					}
					manyFiles(b, dir)
				})
				b.StartTimer()
				stack(b, o, "st"+id, id)
			}
		})
	}
}
