package snapshot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/kilnbuild/kiln/internal/plainjson"
	"github.com/kilnbuild/kiln/internal/rootless"
	"github.com/kilnbuild/kiln/internal/store"
	"golang.org/x/sys/unix"
)

// recordBucket holds a record for every snapshot that was persisted.
const recordBucket = "snapshot"

// Overlay is the overlay snapshotter. All records are in memory; the store has
// those that must survive.
//
// Removal goes: record, then the directory's rename and deletion by a goroutine
// that Close waits for.
type Overlay struct {
	dir   string // where the snapshots are
	db    *store.DB
	trash *trash
	// options are the mount options besides the layers, as far as the kernel
	// has them.
	options []string
	// xattr is the prefix of overlay's own xattrs.
	xattr string
	most  int // how many layers are stacked; tests stack fewer

	mu sync.Mutex // guards what is below; never held across I/O
	// copying are the layers of which portable copies are made, with what is closed
	// when one is done.
	copying map[string]chan struct{}
	// unreadable are the records that can't be decoded, by id. Their snapshots are
	// lost, which costs what was cached in them; Check tells, and Sweep ends it.
	unreadable map[string]error
	snaps      map[string]*snap
	doubts     doubts
}

// snap is a snapshot in memory.
type snap struct {
	record
	id       string
	children int  // snapshots on top of it, and stacks that list it
	stored   bool // its record is in the store
	busy     bool // between the reservation of the id and the end of Prepare

	written time.Time // when this process last wrote to it, as far as that is over
	doubt   error     // why its files may not be what was written
}

// record is what the store keeps of a snapshot.
type record struct {
	Parent    string   `json:"p,omitempty"`
	Layers    []string `json:"l,omitempty"` // of a stack, which has no directory
	Committed bool     `json:"c,omitempty"`
	// At is when it was committed, in nanoseconds since 1970: no file is written
	// afterwards. 0 in records of older daemons.
	At   int64 `json:"t,omitempty"`
	Form form  `json:"f,omitempty"` // of a layer
	// Deletes: the layer has no parent, and still holds deletions, of what it may be
	// stacked on.
	Deletes bool `json:"d,omitempty"`
	Clears  bool `json:"e,omitempty"` // the layer's tar hides all that it is stacked on
	Ground  bool `json:"g,omitempty"` // there is a ground; see groundPrefix
}

func (r record) encode() []byte {
	value, _ := json.Marshal(r) // can't fail: these are strings and flags
	return value
}

// decode reads what encode has written.
func (r *record) decode(value []byte) error {
	if plainjson.Object(value, r.set) {
		return nil
	}
	*r = record{}
	return json.Unmarshal(value, r)
}

// set sets a field to a value of JSON, and says whether it could.
func (r *record) set(name, value []byte) bool {
	switch string(name) {
	case "p":
		return plainjson.Text(value, &r.Parent)
	case "l":
		return plainjson.Texts(value, &r.Layers)
	case "c":
		return plainjson.Flag(value, &r.Committed)
	case "t":
		return plainjson.Number(value, &r.At)
	case "f":
		return plainjson.Text(value, &r.Form)
	case "d":
		return plainjson.Flag(value, &r.Deletes)
	case "e":
		return plainjson.Flag(value, &r.Clears)
	case "g":
		return plainjson.Flag(value, &r.Ground)
	}
	return false
}

var _ Snapshotter = (*Overlay)(nil)

// NewOverlay opens the overlay snapshotter with its layers under root, as
// snapshots/<id>/{fs,work}. Records live in db. The result is an *Overlay.
func NewOverlay(root string, db *store.DB) (Snapshotter, error) {
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("overlay snapshotter: %w", err)
	}
	if strings.ContainsAny(root, ":,\\\n") {
		return nil, fmt.Errorf("overlay snapshotter: the path %q has a colon, comma, backslash or newline, which overlay takes for something else", root)
	}
	o := &Overlay{dir: filepath.Join(root, "snapshots"), db: db, xattr: "trusted.overlay.", most: maxLayers, snaps: map[string]*snap{}, unreadable: map[string]error{}, copying: map[string]chan struct{}{}}
	if err := os.MkdirAll(o.dir, 0o711); err != nil {
		return nil, fmt.Errorf("overlay snapshotter: %w", err)
	}
	o.trash = newTrash(o.dir)
	if rootless.Here().Mapped() {
		o.xattr = "user.overlay."
	}
	if o.options, err = probeOverlay(o.dir, o.xattr == "user.overlay."); err != nil {
		return nil, fmt.Errorf("overlay snapshotter: %w", err)
	}
	o.load()
	return o, nil
}

// load reads the records.
func (o *Overlay) load() {
	o.db.Scan(recordBucket, "", func(id string, value []byte) bool {
		s := &snap{id: id, stored: true}
		if err := s.decode(value); err != nil {
			o.unreadable[id] = fmt.Errorf("record of snapshot %q: %w", id, err)
			return true
		}
		o.snaps[id] = s
		return true
	})
	for _, s := range o.snaps {
		o.count(s, +1)
	}
}

// Settle waits until the files of removed snapshots are gone. Those whose
// removal isn't durable yet aren't waited for.
func (o *Overlay) Settle(ctx context.Context) error { return o.trash.settle(ctx) }

// Close waits for files to be deleted.
func (o *Overlay) Close() error { return o.trash.Close() }

// Name is "overlayfs", as in upstream's worker labels.
func (o *Overlay) Name() string { return "overlayfs" }

// maxID is how long ids can be.
const maxID = 64

// validID reports whether id is the name of a directory and nothing else: letters
// and digits, and after the first also _ . -
func validID(id string) bool {
	for i, c := range []byte(id) {
		isPunct := c == '_' || c == '.' || c == '-'
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || i > 0 && isPunct) {
			return false
		}
	}
	return id != "" && len(id) <= maxID
}

func (o *Overlay) path(id string) string   { return filepath.Join(o.dir, id) }
func (o *Overlay) fsPath(id string) string { return o.dir + "/" + id + "/fs" }

// getLocked returns the snapshot id.
func (o *Overlay) getLocked(id string) (*snap, error) {
	if s := o.snaps[id]; s != nil && !s.busy {
		return s, nil
	}
	return nil, fmt.Errorf("snapshot %q: %w", id, ErrNotFound)
}

func (o *Overlay) committedLocked(id string) (*snap, error) {
	s, err := o.soundGetLocked(id)
	if err == nil && !s.Committed {
		err = fmt.Errorf("snapshot %q is not committed", id)
	}
	return s, err
}

// soundGetLocked is getLocked for a snapshot whose files are what was written.
func (o *Overlay) soundGetLocked(id string) (*snap, error) {
	s, err := o.getLocked(id)
	if err == nil && s.doubt != nil {
		return nil, fmt.Errorf("snapshot %q: %w: its files may be damaged: %w", id, ErrNotFound, s.doubt)
	}
	return s, err
}

// count adds n to the children of what s stands on.
func (o *Overlay) count(s *snap, n int) {
	if p := o.snaps[s.Parent]; p != nil {
		p.children += n
	}
	for _, id := range s.Layers {
		if l := o.snaps[id]; l != nil {
			l.children += n
		}
	}
}

// reserve takes the id of s, and holds what it stands on.
func (o *Overlay) reserve(s *snap) error {
	if !validID(s.id) {
		return fmt.Errorf("snapshot id %q: only letters, digits, and inside it _ . and - are possible, at most %d", s.id, maxID)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.snaps[s.id] != nil {
		return fmt.Errorf("snapshot %q: %w", s.id, ErrExists)
	}
	if s.Parent != "" {
		if _, err := o.committedLocked(s.Parent); err != nil {
			return fmt.Errorf("parent of %s: %w", s.id, err)
		}
	}
	for _, id := range s.Layers {
		if _, err := o.committedLocked(id); err != nil {
			return fmt.Errorf("layer of %s: %w", s.id, err)
		}
	}
	o.snaps[s.id] = s
	o.count(s, +1)
	return nil
}

// dropLocked forgets s, and lets go of what it stands on.
func (o *Overlay) dropLocked(s *snap) {
	o.count(s, -1)
	delete(o.snaps, s.id)
}

// Prepare starts the active snapshot id on top of parent ("" for an empty
// one), which must be committed.
func (o *Overlay) Prepare(ctx context.Context, id, parent string) error {
	s := &snap{id: id, record: record{Parent: parent}, busy: true}
	if err := o.reserve(s); err != nil {
		return err
	}
	err := o.makeDir(s)
	o.mu.Lock()
	defer o.mu.Unlock()
	s.busy = false
	if err != nil {
		o.dropLocked(s)
	}
	return err
}

// makeDir makes the files of a new snapshot. Its root directory looks like the
// parent's, which it stands for once something is mounted.
func (o *Overlay) makeDir(s *snap) (err error) {
	o.mu.Lock()
	layers, err := o.layersLocked(s.id)
	o.mu.Unlock()
	if err != nil {
		return err
	}
	dir := o.path(s.id)
	if err := os.Mkdir(dir, 0o700); err != nil {
		if errors.Is(err, os.ErrExist) {
			return fmt.Errorf("snapshot %q: %w: %w", s.id, ErrExists, err)
		}
		return fmt.Errorf("prepare snapshot: %w", err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("prepare snapshot %s: %w", s.id, errors.Join(err, os.RemoveAll(dir)))
		}
	}()
	fs := o.fsPath(s.id)
	if err := os.Mkdir(fs, 0o755); err != nil {
		return err
	}
	if s.Parent == "" {
		return os.Chmod(fs, 0o755) // whatever the umask
	}
	return copyRoot(layers[len(layers)-2], fs)
}

// copyRoot gives the directory dst the owner, mode, times and xattrs of src.
func copyRoot(src, dst string) error {
	from, err := unix.Open(src, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the parent's layer %s: %w", src, gone(err))
	}
	defer unix.Close(from)
	to, err := unix.Open(dst, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", dst, err)
	}
	defer unix.Close(to)
	if err := copyMeta(from, to); err != nil {
		return fmt.Errorf("copy the root's metadata from %s: %w", src, err)
	}
	return nil
}

// gone makes ErrNotFound of an error that says that a file isn't there.
func gone(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	return err
}

// Commit makes the active snapshot id immutable. Nothing is copied.
func (o *Overlay) Commit(ctx context.Context, id string) error {
	o.mu.Lock()
	s, err := o.getLocked(id)
	switch {
	case err == nil && s.Committed:
		err = fmt.Errorf("commit snapshot %q: %w", id, ErrNotActive)
	case err == nil && s.doubt != nil:
		err = fmt.Errorf("commit snapshot %q: what was written to it may be damaged: %w", id, s.doubt)
	case err == nil:
		now := time.Now()
		s.Committed, s.stored, s.At, s.written = true, false, now.UnixNano(), now
	}
	o.mu.Unlock()
	if err != nil || s.Parent == "" && !s.Deletes {
		return err
	}
	return clearWork(o.path(id) + "/work")
}

// Reopen makes the committed snapshot id active again. It must have no
// children.
func (o *Overlay) Reopen(ctx context.Context, id string) error {
	was, err := o.reopen(id)
	if was.Form == formCopy { // of what it was
		o.trash.discard(o.portablePath(id))
	}
	if was.Ground {
		o.trash.discard(o.groundPath(id))
	}
	return err
}

// reopen returns what the record was.
func (o *Overlay) reopen(id string) (was record, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	s, err := o.soundGetLocked(id)
	switch {
	case err != nil:
		return was, err
	case !s.Committed:
		return was, nil
	case s.children > 0:
		return was, fmt.Errorf("reopen snapshot %q: %w", id, ErrInUse)
	case len(s.Layers) > 0:
		return was, fmt.Errorf("reopen snapshot %q: it is a stack and has no files of its own", id)
	}
	was = s.record
	s.Committed, s.Form, s.Ground, s.stored = false, formUnknown, false, false
	return was, nil
}

// Stack makes the committed snapshot id out of existing committed snapshots,
// lowest first. It copies no content: of a layer that is right on its own parent
// only, it makes a copy with hard links, once, and so it does of all where they are
// more than the kernel's overlay can stack.
func (o *Overlay) Stack(ctx context.Context, id string, layers []string) (grown []string, err error) {
	if len(layers) == 0 {
		return nil, fmt.Errorf("stack %q: there are no layers", id)
	}
	if layers, err = o.ownLayers(layers); err != nil {
		return nil, fmt.Errorf("stack %q: %w", id, err)
	}
	s := &snap{id: id, record: record{Layers: layers, Committed: true}, busy: true}
	if err := o.reserve(s); err != nil {
		return nil, err
	}
	grown, err = o.makeAllPortable(ctx, id)
	o.mu.Lock()
	s.busy = false
	o.mu.Unlock()
	if err == nil {
		var more []string
		more, err = o.Ground(ctx, id)
		grown = append(grown, more...)
	}
	if err != nil {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.dropLocked(s)
		return grown, fmt.Errorf("stack %q: %w", id, err)
	}
	return grown, nil
}

// ownLayers returns what layers consist of, without stacks among them.
func (o *Overlay) ownLayers(layers []string) (own []string, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, id := range layers {
		s, err := o.committedLocked(id)
		if err != nil {
			return nil, fmt.Errorf("layer: %w", err)
		}
		if own, err = o.ownLocked(own, s); err != nil {
			return nil, err
		}
	}
	return own, nil
}

// makeAllPortable makes the layers of the stack id what they have to be in it.
func (o *Overlay) makeAllPortable(ctx context.Context, id string) (grown []string, err error) {
	layers, err := o.abroad(id)
	if err != nil {
		return nil, err
	}
	for _, l := range layers {
		made, err := o.makePortable(ctx, l)
		if err != nil {
			return grown, err
		}
		if made {
			grown = append(grown, l)
		}
	}
	return grown, nil
}

// Stat describes id.
func (o *Overlay) Stat(ctx context.Context, id string) (Info, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	s, err := o.getLocked(id)
	if err != nil {
		return Info{}, err
	}
	return s.info(), nil
}

func (s *snap) info() Info { return Info{ID: s.id, Parent: s.Parent, Committed: s.Committed} }

// Persist adds the records of id, and of parents that have none yet, to b.
func (o *Overlay) Persist(b *store.Batch, id string) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if _, err := o.soundGetLocked(id); err != nil {
		return err
	}
	added := map[string]record{}
	if err := o.persistLocked(b, id, added); err != nil || len(added) == 0 {
		return err
	}
	// Only now it is sure that the batch was written. Until then others write
	// the same records once more.
	b.OnDurable(func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		for id, r := range added {
			if s := o.snaps[id]; s != nil && s.Committed == r.Committed && s.Form == r.Form && s.Ground == r.Ground {
				s.stored = true
			}
		}
	})
	return nil
}

func (o *Overlay) persistLocked(b *store.Batch, id string, added map[string]record) error {
	s := o.snaps[id]
	if s == nil || s.stored {
		return nil
	}
	if _, ok := added[id]; ok {
		return nil
	}
	added[id] = s.record
	for _, below := range s.below() {
		if err := o.persistLocked(b, below, added); err != nil {
			return err
		}
	}
	b.Put(recordBucket, id, s.encode())
	return nil
}

// Remove adds the deletion of id's record to b; the files go in the background
// once b is durable. A parent of others is ErrInUse, a missing id is fine.
func (o *Overlay) Remove(b *store.Batch, id string) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	s, err := o.getLocked(id)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if s.children > 0 {
		return fmt.Errorf("remove snapshot %q: %w", id, ErrInUse)
	}
	o.dropLocked(s)
	b.Delete(recordBucket, id)
	if len(s.Layers) == 0 {
		b.OnDurable(func() { o.trash.delete(o.path(id)) })
	}
	if s.Form == formCopy {
		b.OnDurable(func() { o.trash.delete(o.portablePath(id)) })
	}
	if s.Ground {
		b.OnDurable(func() { o.trash.delete(o.groundPath(id)) })
	}
	return nil
}

// Walk calls fn for every snapshot, parents before children.
func (o *Overlay) Walk(fn func(Info) error) error {
	for _, s := range o.ordered() {
		if err := fn(s); err != nil {
			return err
		}
	}
	return nil
}

// ordered returns all snapshots, each after those it stands on.
func (o *Overlay) ordered() []Info {
	o.mu.Lock()
	defer o.mu.Unlock()
	out := make([]Info, 0, len(o.snaps))
	done := make(map[string]bool, len(o.snaps))
	var visit func(id string)
	visit = func(id string) {
		s := o.snaps[id]
		if s == nil || s.busy || done[id] {
			return
		}
		done[id] = true
		visit(s.Parent)
		for _, l := range s.Layers {
			visit(l)
		}
		out = append(out, s.info())
	}
	for _, id := range slices.Sorted(maps.Keys(o.snaps)) {
		visit(id)
	}
	return out
}
