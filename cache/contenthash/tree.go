package contenthash

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
)

// sum is a sha256.
type sum [sha256.Size]byte

func (s sum) digest() digest.Digest { return digest.NewDigestFromBytes(digest.SHA256, s[:]) }

// appendTo appends s as text, the form in which digests enter other digests.
func (s *sum) appendTo(b []byte) []byte {
	return hex.AppendEncode(append(b, "sha256:"...), s[:])
}

type kind uint8

const (
	file kind = iota // and whatever is neither of the others
	dir
	symlink
)

// node is what is known of one path.
type node struct {
	name   string
	kind   kind
	hashed bool // head is known
	linked bool // a symlink's link is known
	head   sum  // of the header and, for a file, its bytes
	link   string
	*dirNode
	stat *stat // as recorded; nil if the node comes from a scan
}

// dirNode is the part of a node that only directories have.
type dirNode struct {
	listed   bool // children are complete
	folded   bool // tree is known: implies listed and hashed, here and below
	tree     sum  // the recursive digest
	children []*node
}

// sum is the digest that stands for n where its contents count.
func (n *node) sum() *sum {
	if n.kind == dir {
		return &n.tree
	}
	return &n.head
}

func newDir(name string) *node { return &node{name: name, kind: dir, dirNode: &dirNode{}} }

// child returns the child called name, nil if there is none that is known.
func (n *node) child(name string) *node {
	if i, ok := n.find(name); ok {
		return n.children[i]
	}
	return nil
}

// find returns where the child called name is or would be. n is a directory.
func (n *node) find(name string) (int, bool) {
	return slices.BinarySearchFunc(n.children, name, func(c *node, name string) int {
		return strings.Compare(c.name, name)
	})
}

// each calls fn for n and all below it, in order, with their paths.
func (n *node) each(at string, fn func(n *node, at string) bool) bool {
	if !fn(n, at) {
		return false
	}
	if n.kind == dir {
		for _, c := range n.children {
			if !c.each(at+"/"+c.name, fn) {
				return false
			}
		}
	}
	return true
}

// fold computes the recursive digest of n, below which all heads are known.
func (n *node) fold() {
	if n.folded {
		return
	}
	size := 1 + 71
	for _, c := range n.children {
		if c.kind == dir {
			c.fold()
		}
		size += 1 + len(c.name) + 71
	}
	b := make([]byte, 0, size)
	b = n.head.appendTo(append(b, 0))
	for _, c := range n.children {
		b = c.appendEntry(b, "")
	}
	n.tree, n.folded = sha256.Sum256(b), true
}

// appendEntry appends n as a line of the directory that it is in.
func (n *node) appendEntry(b []byte, prefix string) []byte {
	at := prefix + "\x00" + n.name
	b = n.sum().appendTo(append(b, at...))
	if n.kind != dir {
		return b
	}
	// Names that start with 0xff also count in the directory above theirs:
	// upstream finds the entry after a directory by searching for its path
	// followed by that byte, and everybody's digests follow.
	for i, _ := n.find("\xff"); i < len(n.children); i++ {
		b = n.children[i].appendEntry(b, at)
	}
	return b
}

// tree is what is known of a record. Its holder (see acquire) alone uses the
// fields; a holder may do I/O.
type tree struct {
	id   string
	held chan struct{} // has capacity 1; full while held

	root   *node
	stored stamp // of the stored form that root was read from or saved as
	// answers are results of selections, whose evaluation costs time even if
	// all digests are known. A record's content never changes.
	answers map[string]digest.Digest
}

func newTree(id string) *tree {
	return &tree{id: id, held: make(chan struct{}, 1), root: newDir("")}
}

func (t *tree) acquire(ctx context.Context) error {
	select {
	case t.held <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (t *tree) release() { <-t.held }

// set replaces everything that is known.
func (t *tree) set(root *node, stored stamp) {
	t.root, t.stored, t.answers = root, stored, nil
}

// load takes over what is stored beside rec if the tree doesn't come from it.
// Damaged data is as none: what it said is found again in the files.
func (t *tree) load(rec record) {
	data, _ := rec.Metadata(metadataKey)
	stored := stampOf(data)
	if stored == t.stored {
		return
	}
	root, nodes, err := decode(data)
	if err != nil {
		root, nodes = newDir(""), 1
	}
	t.set(root, stored)
	shared.weigh(t, nodes)
}

// store writes the tree beside rec.
func (t *tree) store(rec record) {
	data, nodes := encode(t.root)
	rec.SetMetadata(metadataKey, data)
	t.stored = stampOf(data)
	shared.weigh(t, nodes)
}
