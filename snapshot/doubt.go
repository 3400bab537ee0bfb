package snapshot

import (
	"fmt"
	"time"

	"github.com/kilnbuild/kiln/internal/store"
	"github.com/opencontainers/go-digest"
)

// doubts counts how often the kernel lost files that it couldn't write, for those
// who were writing at that time. It is guarded by the lock of whom it belongs to.
type doubts struct {
	n   int
	why error
}

func (d *doubts) add(why error) {
	d.n++
	d.why = why
}

// since returns an error if there was another one after the first n.
func (d *doubts) since(n int) error {
	if d.n == n {
		return nil
	}
	return fmt.Errorf("what was written so far may be damaged: %w", d.why)
}

// Doubt is called when files that were written since the given time may be
// damaged; see store.DB.OnDoubt. Snapshots with such files aren't there any more
// for anybody, and active ones, but for those in idle, can't be committed. It
// returns the committed ones.
func (o *Overlay) Doubt(since time.Time, why error, idle map[string]bool) (lost []string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.doubts.add(why)
	for id, s := range o.snaps {
		switch {
		case s.doubt != nil:
		case s.Committed && !s.busy && !s.written.Before(since):
			s.doubt = why
			lost = append(lost, id)
		case !s.Committed && !idle[id]:
			s.doubt = why
		}
	}
	return lost
}

// Doubt is called when files that were written since the given time may be
// damaged; see store.DB.OnDoubt. It adds the removal of such blobs to batch and
// returns them. What is being written can't be committed.
func (b *Blobs) Doubt(batch *store.Batch, since time.Time, why error) (lost []digest.Digest, err error) {
	b.mu.Lock()
	b.doubts.add(why)
	for dgst, at := range b.written {
		if !at.Before(since) {
			lost = append(lost, dgst)
		}
	}
	clear(b.written)
	b.mu.Unlock()
	for _, dgst := range lost {
		if err := b.Remove(batch, dgst); err != nil {
			return nil, err
		}
	}
	return lost, nil
}

func (b *Blobs) doubtsSoFar() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.doubts.n
}

// writtenLocked notes that the blob was written now. Those that are durable by now
// are forgotten now and then.
func (b *Blobs) writtenLocked(dgst digest.Digest) {
	b.written[dgst] = time.Now()
	if len(b.written) < b.prune {
		return
	}
	synced := b.db.Synced()
	for d, at := range b.written {
		if at.Before(synced) {
			delete(b.written, d)
		}
	}
	b.prune = max(64, 2*len(b.written))
}
