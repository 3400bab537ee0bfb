package local

import (
	"io/fs"
	"reflect"
	"slices"
	"testing"

	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"
)

func TestState(t *testing.T) {
	entries := []*types.Stat{
		{Path: "a", Mode: 0o644, Size: 1 << 40, ModTime: -5},
		{Path: "d", Mode: uint32(fs.ModeDir | 0o755), Uid: 1<<32 - 1, Gid: 7, Xattrs: map[string][]byte{"user.b": {0}, "user.a": nil}},
		{Path: "d/ä", Mode: uint32(fs.ModeSymlink | 0o777), Linkname: "../a"},
		{Path: "d/äx", Mode: uint32(fs.ModeDevice), Devmajor: 1, Devminor: 3},
		{Path: "d.x", Mode: 0o600, ModTime: 1<<63 - 1},
	}
	s := state{metadata: "sha256:x"}
	for _, e := range entries {
		s.add(e)
	}
	raw := s.encode()
	o, err := openState(raw)
	must(t, err)
	if o.metadata != "sha256:x" {
		t.Errorf("metadata %q", o.metadata)
	}
	for _, want := range entries {
		if !o.more {
			t.Fatal("ends early")
		}
		k, err := kindOf(want)
		must(t, err)
		if !same(o.cur, want, k) || o.cur.Path != want.Path || o.cur.ModTime != want.ModTime {
			t.Errorf("got %v, want %v", o.cur, want)
		}
		must(t, o.next())
	}
	if o.more {
		t.Error("more than was added")
	}
	if !validState(raw) || !validState(nil) {
		t.Error("a good state counts as damaged")
	}
	for i := 1; i < len(raw); i++ {
		cut, err := openState(raw[:i])
		n := 0
		for err == nil && cut.more {
			n++
			err = cut.next()
		}
		if err == nil && n == len(entries) {
			t.Errorf("the first %d of %d bytes are enough", i, len(raw))
		}
	}
}

func FuzzState(f *testing.F) {
	s := state{}
	s.add(&types.Stat{Path: "a", Mode: 1})
	s.add(&types.Stat{Path: "a/b", Xattrs: map[string][]byte{"k": {1}}})
	f.Add(s.encode())
	f.Fuzz(func(t *testing.T, raw []byte) {
		o, err := openState(raw)
		var paths []string
		for err == nil && o.more {
			paths = append(paths, o.cur.Path)
			err = o.next()
		}
		if !slices.IsSortedFunc(paths, comparePaths) {
			t.Errorf("not in order: %q", paths)
		}
		for _, p := range paths {
			must(t, checkPath(p))
		}
	})
}

func TestComparePaths(t *testing.T) {
	paths := []string{"a", "a/b", "a/b/c", "a/b.c", "a b", "a.b", "ab", "a\xffb", "b"}
	for _, a := range paths {
		for _, b := range paths {
			if sign(comparePaths(a, b)) != sign(fsutil.ComparePath(a, b)) {
				t.Errorf("%q, %q: %d, clients order them as %d", a, b, comparePaths(a, b), fsutil.ComparePath(a, b))
			}
		}
	}
}

func sign(n int) int { return min(1, max(-1, n)) }

func TestSame(t *testing.T) {
	base := func() *types.Stat {
		return &types.Stat{Path: "p", Mode: 0o644, Uid: 1, Gid: 2, Size: 3, ModTime: 4, Linkname: "l", Devmajor: 5, Devminor: 6, Xattrs: map[string][]byte{"a": {1}}}
	}
	if !same(base(), base(), kindFile) {
		t.Error("equal entries differ")
	}
	typ := reflect.TypeFor[types.Stat]()
	for i := range typ.NumField() {
		name := typ.Field(i).Name
		if !typ.Field(i).IsExported() || name == "Path" {
			continue
		}
		other := base()
		v := reflect.ValueOf(other).Elem().Field(i)
		v.Set(reflect.Zero(v.Type()))
		if same(base(), other, kindFile) {
			t.Errorf("a change of %s isn't seen", name)
		}
	}
	other := base()
	other.ModTime, other.Size = 9, 9
	if !same(base(), other, kindDir) {
		t.Error("mtime and size of a directory matter")
	}
}
