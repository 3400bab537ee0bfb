package ops

import (
	"context"
	"io"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// fileSmall is the size up to which a file is copied through a buffer: two
	// system calls.
	fileSmall = 128 << 10
	// fileChunk bounds one copy_file_range, so that a cancelled copy ends soon.
	fileChunk = 64 << 20
)

var fileBuffers = sync.Pool{New: func() any { b := make([]byte, fileSmall); return &b }}

// fileMover copies file contents the cheapest way that the filesystems have,
// and remembers which ways they don't.
type fileMover struct{ noClone, noRange atomic.Bool }

// move copies what the regular file from, described by st, holds to the new,
// empty file to.
func (m *fileMover) move(ctx context.Context, to, from int, st *unix.Stat_t) error {
	if st.Size == 0 {
		return nil
	}
	if !m.noClone.Load() {
		err := unix.IoctlFileClone(to, from)
		if err == nil {
			return nil
		}
		if !fileCantMove(err) {
			return err
		}
		m.noClone.Store(true)
	}
	if st.Size <= fileSmall {
		return fileBuffered(ctx, to, from, st.Size)
	}
	if st.Blocks*512 < st.Size {
		return m.sparse(ctx, to, from, st.Size)
	}
	return m.extent(ctx, to, from, 0, st.Size)
}

// sparse copies only where from has data.
func (m *fileMover) sparse(ctx context.Context, to, from int, size int64) error {
	if err := unix.Ftruncate(to, size); err != nil {
		return err
	}
	for at := int64(0); at < size; {
		data, err := unix.Seek(from, at, unix.SEEK_DATA)
		if err == unix.ENXIO {
			return nil // nothing but a hole to the end
		}
		if err != nil {
			return m.extent(ctx, to, from, 0, size) // can't tell holes
		}
		hole, err := unix.Seek(from, data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if err := m.extent(ctx, to, from, data, hole); err != nil {
			return err
		}
		at = hole
	}
	return nil
}

// extent copies the bytes from at to end.
func (m *fileMover) extent(ctx context.Context, to, from int, at, end int64) error {
	for at < end && !m.noRange.Load() {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		in, out := at, at
		n, err := unix.CopyFileRange(from, &in, to, &out, int(min(end-at, fileChunk)), 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil && !fileCantMove(err) {
			return err
		}
		if err != nil || n == 0 {
			m.noRange.Store(err != nil)
			break
		}
		at += int64(n)
	}
	if at == end {
		return nil
	}
	if _, err := unix.Seek(from, at, io.SeekStart); err != nil {
		return err
	}
	if _, err := unix.Seek(to, at, io.SeekStart); err != nil {
		return err
	}
	return fileBuffered(ctx, to, from, end-at)
}

// fileCantMove reports whether err says that the filesystems can't do this
// between each other, rather than that something went wrong.
func fileCantMove(err error) bool {
	switch err {
	case unix.ENOSYS, unix.EOPNOTSUPP, unix.EXDEV, unix.EINVAL, unix.ENOTTY, unix.EPERM, unix.ETXTBSY, unix.EBADF:
		return true
	}
	return false
}

// fileBuffered copies size bytes from where both files stand. A source that
// ends before them is an error: it changed, or its filesystem is damaged.
func fileBuffered(ctx context.Context, to, from int, size int64) error {
	buf := fileBuffers.Get().(*[]byte)
	defer fileBuffers.Put(buf)
	for size > 0 {
		n, err := unix.Read(from, (*buf)[:min(size, int64(len(*buf)))])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		if err := fileWriteAll(to, (*buf)[:n]); err != nil {
			return err
		}
		if size -= int64(n); size > 0 {
			if err := context.Cause(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

func fileWriteAll(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}
