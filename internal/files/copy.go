package files

import (
	"context"
	"io"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// bufferSize is also the size up to which a file is copied through a buffer:
	// two system calls.
	bufferSize = 128 << 10
	// chunk bounds one copy_file_range, so that a cancelled copy ends soon.
	chunk = 64 << 20
)

type buffer [bufferSize]byte

var buffers = sync.Pool{New: func() any { return new(buffer) }}

// Copier copies the contents of files the cheapest way that their filesystems
// have, and remembers which ways they don't.
type Copier struct{ noClone, noRange atomic.Bool }

// Copy copies what the regular file from, described by st, holds to the new, empty
// file to. Holes stay holes.
func (c *Copier) Copy(ctx context.Context, to, from int, st *unix.Stat_t) error {
	if st.Size == 0 {
		return nil
	}
	if !c.noClone.Load() {
		err := unix.IoctlFileClone(to, from)
		if err == nil {
			return nil
		}
		if !cantCopy(err) {
			return err
		}
		c.noClone.Store(true)
	}
	if st.Size <= bufferSize {
		return buffered(ctx, to, from, st.Size)
	}
	if st.Blocks*512 < st.Size {
		return c.sparse(ctx, to, from, st.Size)
	}
	return c.extent(ctx, to, from, 0, st.Size)
}

// sparse copies only where from has data.
func (c *Copier) sparse(ctx context.Context, to, from int, size int64) error {
	if err := unix.Ftruncate(to, size); err != nil {
		return err
	}
	for at := int64(0); at < size; {
		data, err := unix.Seek(from, at, unix.SEEK_DATA)
		if err == unix.ENXIO {
			return nil // nothing but a hole to the end
		}
		if err != nil {
			return c.extent(ctx, to, from, 0, size) // can't tell holes
		}
		hole, err := unix.Seek(from, data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if err := c.extent(ctx, to, from, data, hole); err != nil {
			return err
		}
		at = hole
	}
	return nil
}

// extent copies the bytes from at to end.
func (c *Copier) extent(ctx context.Context, to, from int, at, end int64) error {
	for at < end && !c.noRange.Load() {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		in, out := at, at
		n, err := unix.CopyFileRange(from, &in, to, &out, int(min(end-at, chunk)), 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil && !cantCopy(err) {
			return err
		}
		if err != nil || n == 0 {
			c.noRange.Store(err != nil)
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
	return buffered(ctx, to, from, end-at)
}

// cantCopy reports whether err says that the filesystems can't do this
// between each other, rather than that something went wrong.
func cantCopy(err error) bool {
	switch err {
	case unix.ENOSYS, unix.EOPNOTSUPP, unix.EXDEV, unix.EINVAL, unix.ENOTTY, unix.EPERM, unix.ETXTBSY, unix.EBADF:
		return true
	}
	return false
}

// buffered copies size bytes from where both files stand. A source that
// ends before them is an error: it changed, or its filesystem is damaged.
func buffered(ctx context.Context, to, from int, size int64) error {
	buf := buffers.Get().(*buffer)
	defer buffers.Put(buf)
	for size > 0 {
		n, err := unix.Read(from, buf[:min(size, int64(bufferSize))])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		if err := WriteAll(to, buf[:n]); err != nil {
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

// WriteAll writes all of b to the open file fd.
func WriteAll(fd int, b []byte) error {
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

var zeros buffer

// WriteSparse writes what r holds to the new file fd, and leaves holes where it is
// zero for long: an archive of a few bytes may stand for a file of any size.
func WriteSparse(ctx context.Context, fd int, r io.Reader) error {
	buf := buffers.Get().(*buffer)
	defer buffers.Put(buf)
	for end := int64(0); ; {
		n, rerr := fill(r, buf[:])
		end += int64(n)
		if n == bufferSize && *buf == zeros {
			if err := unix.Ftruncate(fd, end); err != nil {
				return err
			}
			if _, err := unix.Seek(fd, end, io.SeekStart); err != nil {
				return err
			}
		} else if err := WriteAll(fd, buf[:n]); err != nil {
			return err
		}
		if rerr == io.EOF {
			return nil
		}
		if rerr != nil {
			return rerr
		}
		if err := context.Cause(ctx); err != nil {
			return err
		}
	}
}

// fill reads until b is full or there is an error. Unlike io.ReadFull's, that of an
// end in between is r's own.
func fill(r io.Reader, b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var m int
		m, err = r.Read(b[n:])
		n += m
	}
	return n, err
}
