package local

import (
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io/fs"
	"runtime"
	"sync"

	"github.com/kilnbuild/kiln/cache/contenthash"
	"github.com/kilnbuild/kiln/internal/files"
	"github.com/opencontainers/go-digest"
	"github.com/tonistiigi/fsutil/types"
	"golang.org/x/sys/unix"
)

const (
	// maxOpen bounds the files that a client may send at the same time; the
	// usual one sends four.
	maxOpen = 128
	// backlog is how many chunks wait for a writer.
	backlog = 32
)

// file is a file on its way. Its fields belong to its writer once data was
// put.
type file struct {
	st       *types.Stat
	inherits bool
	rec      recorder
	writer   int // index + 1, 0 if not given out yet
	fd       int
	hash     *hasher
	entry    contenthash.Entry
}

// chunk is a piece of a file's data, and whether it was the last.
type chunk struct {
	f    *file
	data *types.Packet // may be nil
	last bool
}

// writers write and hash file data, each its own files.
type writers struct {
	cancel context.CancelCauseFunc
	in     []chan chunk
	next   int
	open   int // files given to a writer and not ended; the reader's
	wg     sync.WaitGroup

	mu  sync.Mutex // guards err
	err error
}

func startWriters(cancel context.CancelCauseFunc, root int, umask uint32) *writers {
	w := &writers{cancel: cancel}
	for range min(4, max(2, runtime.GOMAXPROCS(0))) {
		in := make(chan chunk, backlog)
		w.in = append(w.in, in)
		w.wg.Go(func() { w.run(in, newTree(root, umask)) })
	}
	return w
}

// put hands c to the file's writer, waiting for it if it is behind.
func (w *writers) put(ctx context.Context, c chunk) error {
	if c.f.writer == 0 {
		if w.open == maxOpen {
			return fmt.Errorf("client sends more than %d files at the same time", maxOpen)
		}
		w.open++
		w.next = (w.next + 1) % len(w.in)
		c.f.writer = w.next + 1
	}
	if c.last {
		w.open--
	}
	select {
	case w.in[c.f.writer-1] <- c:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// close waits for all that was put and returns what went wrong. No writers at
// all are fine.
func (w *writers) close() error {
	if w == nil {
		return nil
	}
	for _, in := range w.in {
		close(in)
	}
	w.wg.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// run writes what comes in until in is closed. After a failure it only drains.
func (w *writers) run(in chan chunk, t *tree) {
	defer t.close()
	open := map[*file]bool{}
	failed := false
	for c := range in {
		if !failed {
			if err := c.f.take(t, c); err != nil {
				failed = true
				w.mu.Lock()
				if w.err == nil {
					w.err = err
				}
				w.mu.Unlock()
				w.cancel(err)
			}
			if c.f.fd >= 0 {
				open[c.f] = true
			} else {
				delete(open, c.f)
			}
		}
		if c.data != nil {
			c.data.ReturnToVTPool()
		}
	}
	for f := range open {
		f.abandon()
	}
}

// take writes a chunk to the file.
func (f *file) take(t *tree, c chunk) error {
	if f.fd < 0 {
		if err := f.create(t); err != nil {
			return err
		}
	}
	if c.data != nil {
		if err := files.WriteAll(f.fd, c.data.Data); err != nil {
			return pathError("write", f.st.Path, err)
		}
		f.hash.Write(c.data.Data)
	}
	if !c.last {
		return nil
	}
	err := t.finish(f.fd, f.st, f.inherits)
	f.entry.Digest = f.hash.digest()
	f.abandon()
	if err == nil {
		f.rec.Set(f.entry)
	}
	return err
}

func (f *file) create(t *tree) (err error) {
	f.entry = entryOf(f.st)
	f.hash = newHash()
	if err := f.hash.start(f.entry); err != nil {
		f.abandon()
		return err
	}
	f.fd, err = t.create(f.st)
	return err
}

// abandon lets go of what the file holds.
func (f *file) abandon() {
	if f.fd >= 0 {
		unix.Close(f.fd)
		f.fd = -1
	}
	if f.hash != nil {
		f.hash.release()
		f.hash = nil
	}
}

// entryOf is what the content digest of st is made of.
func entryOf(st *types.Stat) contenthash.Entry {
	return contenthash.Entry{
		Path: st.Path, Mode: fs.FileMode(st.Mode), UID: st.Uid, GID: st.Gid,
		Size: st.Size, ModTime: st.ModTime, Linkname: st.Linkname, DevMajor: st.Devmajor, DevMinor: st.Devminor, Xattrs: st.Xattrs,
	}
}

// hasher computes the content digest of one entry.
type hasher struct {
	hash.Hash
	sum [sha256.Size]byte
}

var hashers = sync.Pool{New: func() any { return &hasher{Hash: sha256.New()} }}

func newHash() *hasher {
	h := hashers.Get().(*hasher)
	h.Reset()
	return h
}

func (h *hasher) release() { hashers.Put(h) }

func (h *hasher) start(e contenthash.Entry) error {
	header, err := contenthash.Header(e)
	if err != nil {
		return fmt.Errorf("content digest of %s: %w", e.Path, err)
	}
	h.Write(header)
	return nil
}

func (h *hasher) digest() digest.Digest {
	return digest.NewDigestFromBytes(digest.SHA256, h.Sum(h.sum[:0]))
}
