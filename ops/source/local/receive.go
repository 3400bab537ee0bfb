package local

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/kilnbuild/kiln/cache/contenthash"
	"github.com/kilnbuild/kiln/internal/files"
	"github.com/tonistiigi/fsutil/types"
)

// stream is the transfer's two directions; both end with its context.
type stream interface {
	SendMsg(m any) error
	RecvMsg(m any) error
}

// recorder takes the content digests of what arrives.
type recorder interface {
	Set(contenthash.Entry)
	Remove(path string)
}

// receiver makes a tree equal to what a client sends.
//
// It first only compares with the state of an earlier transfer. If nothing
// differs, nothing is touched. At the first difference it asks for the tree to
// change; when that turns out to be another than the one it compared with, it
// starts over with the entries it has seen.
//
// One goroutine reads the stream, changes the tree's structure at once, and
// hands file data to the writers. It never sends: requests queue without bound
// and go out from a goroutine of their own, because a client may stop reading
// them until its data is taken. Waiting for a writer is fine: writers wait for
// the disk only.
type receiver struct {
	old *oldState // of the tree compared with
	// open gives the tree to change.
	open func() (*place, error)
	// everything: ask also for files that seem unchanged.
	everything bool
	// metadata collects descriptions when only files that wanted accepts are
	// transferred; nil otherwise.
	metadata *listing
	wanted   func(path string) bool
	progress func(bytes int)

	requests *requests
	writers  *writers
	nextID   uint32
	walk     walk
	ended    bool // all entries were described
	waiting  map[uint32]*file
	held     []*types.Stat // directories that aren't wanted so far
	seen     []entry       // while nothing differs

	// From the first difference on:
	changed bool
	umask   uint32
	tree    *tree
	rec     recorder

	result
}

// result is what a transfer finds out about the tree as it will be.
type result struct {
	state   state
	files   []seenFile // in the order of the walk
	dirs    []dirTime
	touched map[string]bool // directories in which something changed
	links   []*types.Stat   // hard links to make
}

// place is the tree to change.
type place struct {
	root int // an open directory
	rec  recorder
	// other is the state of the tree if it isn't the one compared with.
	other *oldState
}

// entry is what the client described.
type entry struct {
	id       uint32
	st       *types.Stat
	kind     kind
	inherits bool // the group of its directory
}

// seenFile is a file that hard links may point to.
type seenFile struct {
	path    string
	written bool // in this transfer
}

// dirTime is a directory whose mtime is set last.
type dirTime struct {
	path  string
	mtime int64
	stale bool // it differs from that of the old state
}

// errSender is what a client reports of itself.
var errSender = errors.New("error from the client")

// run receives until the client is done. When it returns, nothing it started
// runs any more. On failure the tree is in no defined state.
func (r *receiver) run(parent context.Context, s stream) error {
	ctx, cancel := context.WithCancelCause(parent)
	defer cancel(nil)
	r.walk = newWalk()
	r.waiting = map[uint32]*file{}
	r.touched = map[string]bool{}
	r.requests = startRequests(ctx, cancel, s)
	defer func() {
		if r.tree != nil {
			r.tree.close()
		}
	}()

	err := r.receive(ctx, cancel, s)
	if werr := r.writers.close(); err == nil {
		err = werr
	}
	if err == nil {
		err = r.finish()
	}
	if err != nil {
		err = why(err, ctx, parent)
		r.requests.fail(err)
		return err
	}
	if err := r.requests.done(); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return why(goodbye(s), ctx, parent) // it knows why, if the client ended the stream
}

// why returns what ended the first of the contexts that has ended, and err if
// none has. A stream sees the end of a context before the contexts made from
// it do, so the parent is asked, too.
func why(err error, contexts ...context.Context) error {
	if err == nil {
		return nil
	}
	for _, ctx := range contexts {
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
	}
	return err
}

// receive reads until every entry is described and all data has arrived.
func (r *receiver) receive(ctx context.Context, cancel context.CancelCauseFunc, s stream) error {
	prepare := r.open
	r.open = func() (*place, error) {
		p, err := prepare()
		if err == nil {
			r.umask = files.Umask()
			r.writers = startWriters(cancel, p.root, r.umask)
		}
		return p, err
	}
	for !r.ended || len(r.waiting) > 0 {
		p := types.PacketFromVTPool()
		p.ResetVT()
		if err := s.RecvMsg(p); err != nil {
			if errors.Is(err, io.EOF) {
				return errors.New("the client ended the transfer before it was complete")
			}
			return err
		}
		if r.progress != nil {
			r.progress(p.SizeVT())
		}
		kept, err := r.packet(ctx, p)
		if !kept {
			p.Stat = nil
			p.ReturnToVTPool()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// packet handles p. It tells whether someone keeps p.
func (r *receiver) packet(ctx context.Context, p *types.Packet) (kept bool, err error) {
	switch p.Type {
	case types.PACKET_STAT:
		if r.ended {
			return false, errors.New("client sent an entry after the last one")
		}
		if p.Stat == nil {
			r.ended = true
			return false, r.pass(entry{})
		}
		return false, r.stat(p.Stat)
	case types.PACKET_DATA:
		f := r.waiting[p.ID]
		if f == nil {
			return false, fmt.Errorf("client sent data of file %d, which wasn't asked for", p.ID)
		}
		if len(p.Data) == 0 {
			delete(r.waiting, p.ID)
			return false, r.writers.put(ctx, chunk{f: f, last: true})
		}
		return true, r.writers.put(ctx, chunk{f: f, data: p})
	case types.PACKET_ERR:
		return false, fmt.Errorf("%w: %s", errSender, p.Data)
	case types.PACKET_FIN:
		return false, errors.New("client ended the transfer before it was complete")
	}
	return false, fmt.Errorf("client sent a packet of the unknown type %d", p.Type)
}

// stat takes the client's description of the next entry.
func (r *receiver) stat(st *types.Stat) error {
	id := r.nextID
	r.nextID++
	in, err := r.walk.enter(st.Path)
	if err != nil {
		return err
	}
	inherits := in.mode&fs.ModeSetgid != 0
	k, err := kindOf(st)
	if err != nil {
		return err
	}
	if st.Size < 0 {
		return fmt.Errorf("client sent %q with the size %d", st.Path, st.Size)
	}
	if k == kindDir {
		r.walk.push(st.Path, fs.FileMode(st.Mode))
	}
	e := entry{id, st, k, inherits}
	if r.metadata == nil {
		return r.pass(e)
	}
	if st.Path == metadataName {
		return nil
	}
	if err := r.metadata.add(st); err != nil {
		return err
	}
	return r.filter(e)
}

// filter passes on what is wanted, and the directories on the way there.
func (r *receiver) filter(e entry) error {
	for len(r.held) > 0 && !below(e.st.Path, r.held[len(r.held)-1].Path) {
		r.held = r.held[:len(r.held)-1]
	}
	if !r.wanted(e.st.Path) {
		if e.kind == kindDir {
			r.held = append(r.held, e.st)
		}
		return nil
	}
	for _, dir := range r.held {
		if err := r.pass(entry{st: dir, kind: kindDir}); err != nil {
			return err
		}
	}
	r.held = r.held[:0]
	return r.pass(e)
}

// goodbye waits until the client has ended its side, too.
func goodbye(s stream) error {
	for {
		var p types.Packet
		err := s.RecvMsg(&p)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if p.Type == types.PACKET_ERR {
			return fmt.Errorf("%w: %s", errSender, p.Data)
		}
	}
}
