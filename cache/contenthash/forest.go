package contenthash

import (
	"container/list"
	"sync"
)

// What trees take in memory is bounded: about 150 bytes a node, and a kilobyte a
// tree. A small one is read anew in little more time than it is looked up. The tree
// used last is kept whatever its size.
const (
	maxNodes = 400_000
	maxTrees = 500
)

// forest holds the trees in use and those used last.
type forest struct {
	mu    sync.Mutex // guards the fields below and the weight of every grove
	trees map[string]*list.Element
	order list.List // of *grove, the one used last in front
	total int
}

type grove struct {
	*tree
	weight int
}

var shared = newForest()

func newForest() *forest { return &forest{trees: map[string]*list.Element{}} }

// tree returns the tree of the record id, an empty one if there is none.
func (f *forest) tree(id string) *tree {
	f.mu.Lock()
	defer f.mu.Unlock()
	e, ok := f.trees[id]
	if !ok {
		e = f.order.PushFront(&grove{tree: newTree(id)})
		f.trees[id] = e
		f.thinLocked()
	}
	f.order.MoveToFront(e)
	return e.Value.(*grove).tree
}

// weigh notes that t has weight nodes, and has the forest thinned. A forgotten tree
// that somebody holds stays theirs; the next caller reads it anew from beside the
// record.
func (f *forest) weigh(t *tree, weight int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if e, ok := f.trees[t.id]; ok && e.Value.(*grove).tree == t {
		g := e.Value.(*grove)
		f.total += weight - g.weight
		g.weight = weight
	}
	f.thinLocked()
}

// thinLocked forgets what was used longest ago until the rest fits.
func (f *forest) thinLocked() {
	for f.order.Len() > maxTrees || f.total > maxNodes && f.order.Len() > 1 {
		f.forgetLocked(f.order.Back().Value.(*grove).id)
	}
}

// plant puts a tree in the place of whatever is there for the record id.
func (f *forest) plant(id string, root *node, stored stamp, weight int) {
	t := newTree(id)
	t.set(root, stored)
	f.mu.Lock()
	f.forgetLocked(id)
	f.trees[id] = f.order.PushFront(&grove{tree: t})
	f.mu.Unlock()
	f.weigh(t, weight)
}

// Rest lets go of all trees in memory: who asks next reads them anew from beside
// their records.
func Rest() {
	f := shared
	f.mu.Lock()
	defer f.mu.Unlock()
	f.trees, f.total = map[string]*list.Element{}, 0
	f.order.Init()
}

// forget drops the tree of the record id.
func (f *forest) forget(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.forgetLocked(id)
}

func (f *forest) forgetLocked(id string) {
	if e, ok := f.trees[id]; ok {
		f.total -= f.order.Remove(e).(*grove).weight
		delete(f.trees, id)
	}
}
