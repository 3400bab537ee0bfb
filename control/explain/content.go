package explain

import (
	"context"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"path"
	"strings"

	"github.com/kilnbuild/kiln/internal/explanation"
	"github.com/kilnbuild/kiln/internal/sketch"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/solver"
)

// What a step reads by content is kept as the sketch of a set: of each file and
// directory an item, made of a hash of its path and one of its digest, and of
// each directory one for the names in it, as if it were a file called "". Of
// two runs the items that differ can be read, whatever the number of files; the
// paths behind them are found by walking the present tree once more.
type content struct {
	v      *solver.Vertex
	inputs []solver.Result // nil where the content doesn't count
}

// contentOf clones the inputs of eff whose content counts. The caller releases
// it.
func contentOf(eff *solver.Execute) *content {
	c := &content{v: eff.Vertex, inputs: make([]solver.Result, len(eff.Inputs))}
	for i, key := range eff.Contents {
		if key != (solver.Key{}) {
			c.inputs[i] = eff.Inputs[i].Clone()
		}
	}
	return c
}

func (c *content) release() {
	for _, in := range c.inputs {
		if in != nil {
			in.Release()
		}
	}
}

func (c *content) empty() bool {
	for _, in := range c.inputs {
		if in != nil {
			return false
		}
	}
	return true
}

// each calls fn with every item and what it stands for: a path in an input, or
// a directory, whose path ends in a slash, for the names in it.
func (c *content) each(ctx context.Context, fn func(item uint64, input int, path string)) error {
	for i, in := range c.inputs {
		if in == nil {
			continue
		}
		names := map[string]uint32{}
		err := ops.Walk(ctx, c.v, i, in, func(p string, sum [32]byte) {
			fn(item(pathHash(i, p), binary.BigEndian.Uint32(sum[:])), i, p)
			if dir, base := path.Split(p); base != "" {
				names[dir] = names[dir]*16777619 ^ pathHash(0, base)
			}
		})
		if err != nil {
			return err
		}
		for dir, h := range names {
			fn(item(pathHash(i, dir), h), i, dir)
		}
	}
	return nil
}

func item(path, content uint32) uint64 { return uint64(path)<<32 | uint64(content) }

func pathHash(input int, p string) uint32 {
	h := fnv.New64a()
	fmt.Fprintf(h, "%d:%s", input, p)
	sum := h.Sum64()
	return uint32(sum>>32) ^ uint32(sum)
}

// sketch summarises c; nil if nothing counts by content.
func (c *content) sketch(ctx context.Context) ([]byte, error) {
	if c.empty() {
		return nil, nil
	}
	var s sketch.Sketch
	err := c.each(ctx, func(item uint64, _ int, _ string) { s.Toggle(item) })
	if err != nil {
		return nil, err
	}
	return s.Bytes(), nil
}

// contentDistance is in how many items what two runs read by content differs,
// or more than can be if these are too many.
func contentDistance(a, b *record) int {
	if len(a.Sketch) == 0 && len(b.Sketch) == 0 {
		return 0
	}
	return sketchDistance(a, b)
}

// sketchDistance takes much of a stack, that most steps needn't have.
func sketchDistance(a, b *record) int {
	x, ok := sketch.Parse(a.Sketch)
	y, ok2 := sketch.Parse(b.Sketch)
	if items, complete := sketch.Diff(&x, &y); ok && ok2 && complete {
		return len(items)
	}
	return sketch.Size
}

// maxFiles bounds how many files are named.
const maxFiles = 4

// changed names what differs between the content of an earlier run, of which
// there is a sketch, and that of this one.
func (c *content) changed(ctx context.Context, before, now []byte) ([]fileChange, error) {
	a, ok := sketch.Parse(before)
	b, ok2 := sketch.Parse(now)
	if !ok || !ok2 {
		return nil, nil
	}
	items, complete := sketch.Diff(&a, &b)
	d := &differing{items: map[uint64]bool{}}
	for _, it := range items {
		d.items[it] = true
	}
	if err := c.each(ctx, d.see); err != nil {
		return nil, err
	}
	d.nameRemoved(c)
	return d.changes(complete), nil
}

// fileChange is a path that a step reads and how it differs: changed, added,
// removed. An empty how stands for things in the directory that aren't known by
// name.
type fileChange struct {
	input     int
	path, how string
}

// differing finds out what the items of a difference stand for.
type differing struct {
	items map[uint64]bool // those not accounted for yet
	now   []seen          // of this run, in the order of the walk
}

type seen struct {
	item  uint64
	input int
	path  string
}

func (d *differing) see(item uint64, input int, path string) {
	if d.items[item] {
		d.now = append(d.now, seen{item, input, path})
	}
}

// take accounts for the item of an earlier run at a path, if there is one.
func (d *differing) take(path uint32) bool {
	for it := range d.items {
		if uint32(it>>32) == path {
			delete(d.items, it)
			return true
		}
	}
	return false
}

// nameRemoved looks for the names of what is gone among those that were lately
// removed.
func (d *differing) nameRemoved(c *content) {
	for _, s := range d.now {
		delete(d.items, s.item)
	}
	var gone []seen
	for i, in := range c.inputs {
		if in == nil {
			continue
		}
		for _, p := range ops.Removed(in) {
			h := pathHash(i, p)
			isNow := false
			for _, s := range d.now {
				isNow = isNow || uint32(s.item>>32) == h
			}
			if !isNow && d.take(h) {
				gone = append(gone, seen{0, i, p})
			}
		}
	}
	d.now = append(d.now, gone...)
}

// changes lists what was found. Directories whose names differ are told only
// for what is in no other way accounted for.
func (d *differing) changes(complete bool) (out []fileChange) {
	var dirs []fileChange
	named := map[string]bool{} // directories in which a file that came or went is named
	for _, s := range d.now {
		how := "added"
		switch {
		case s.item == 0:
			how = "removed"
		case d.take(uint32(s.item >> 32)):
			how = "changed"
		}
		if strings.HasSuffix(s.path, "/") {
			dirs = append(dirs, fileChange{s.input, s.path, ""})
			continue
		}
		if how != "changed" {
			named[fmt.Sprint(s.input, path.Dir(s.path))] = true
		}
		out = append(out, fileChange{s.input, relative(s.path), how})
	}
	for _, dir := range dirs {
		if !named[fmt.Sprint(dir.input, path.Clean(dir.path))] {
			out = append(out, fileChange{dir.input, relative(dir.path), ""})
			clear(d.items) // what came or went is in there
		}
	}
	complete = complete && len(d.items) == 0
	if len(out) > maxFiles {
		out, complete = out[:maxFiles], false
	}
	if !complete && len(out) > 0 {
		out = append(out, fileChange{out[0].input, "", ""})
	}
	return out
}

// relative is a path as people write it in a Dockerfile.
func relative(p string) string {
	if p = strings.Trim(p, "/"); p == "" {
		return "."
	}
	return p
}

// cause is c as a reason.
func (c fileChange) cause() explanation.Cause {
	if c.how == "" {
		dir := c.path
		if dir == "." {
			dir = "" // of all that it reads
		}
		return explanation.Cause{Kind: explanation.Files, Subject: dir, Certain: true}
	}
	return explanation.Cause{Kind: explanation.File, Subject: c.path, To: c.how, Certain: true}
}
