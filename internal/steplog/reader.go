package steplog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Log reads a log. The zero value is an empty one. Its methods may be called from
// many goroutines.
type Log struct {
	mu    sync.Mutex // guards the fields below
	size  int64
	parts []part
}

// Grow tells the reader how long the log is by now. The files of x remain whose
// they are.
func (l *Log) Grow(x Extent) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, p := range x.Parts[min(len(l.parts), len(x.Parts)):] {
		if p.file == nil {
			return errors.New("internal error: a part of a step's log without its file")
		}
		fd, err := unix.FcntlInt(p.file.Fd(), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return fmt.Errorf("open the log of a step: %w", err)
		}
		l.parts = append(l.parts, part{os.NewFile(uintptr(fd), p.file.Name()), p.Base})
	}
	l.size = max(l.size, x.Size)
	return nil
}

// Open opens a saved log. One that was cut off, in a crash, ends with the last
// chunk that is whole.
func Open(path string) (*Log, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open the log of a step: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open the log of a step: %w", err), f.Close())
	}
	return &Log{size: info.Size(), parts: []part{{File: f}}}, nil
}

// ReadAt reads from the log at off, as an io.ReaderAt.
func (l *Log) ReadAt(p []byte, off int64) (int, error) {
	l.mu.Lock()
	f, base := l.atLocked(off)
	l.mu.Unlock()
	if f == nil {
		return 0, io.EOF
	}
	return f.ReadAt(p, off-base)
}

// atLocked returns the last part that has off.
func (l *Log) atLocked(off int64) (f *os.File, base int64) {
	for _, p := range l.parts {
		if p.base <= off {
			f, base = p.File, p.base
		}
	}
	return f, base
}

// Next returns the chunk whose header is at off, and where the next one is. The
// error is io.EOF if there is none yet.
func (l *Log) Next(off int64) (c Chunk, next int64, err error) {
	l.mu.Lock()
	size := l.size
	l.mu.Unlock()
	var head [headerSize]byte
	if off+headerSize > size {
		return c, off, io.EOF
	}
	if _, err := l.ReadAt(head[:], off); err != nil {
		return c, off, fmt.Errorf("read the log of a step: %w", err)
	}
	c = Chunk{
		Stream: int(head[0]), Time: time.Unix(0, int64(binary.LittleEndian.Uint64(head[1:]))),
		Off: off + headerSize, Size: int(binary.LittleEndian.Uint32(head[9:])),
	}
	if next = c.Off + int64(c.Size); next > size {
		return Chunk{}, off, io.EOF
	}
	return c, next, nil
}

// Data returns the first n bytes of a chunk.
func (l *Log) Data(c Chunk, n int) ([]byte, error) {
	p := make([]byte, n)
	if n > 0 {
		if _, err := l.ReadAt(p, c.Off); err != nil {
			return nil, fmt.Errorf("read the log of a step: %w", err)
		}
	}
	return p, nil
}

// Save gives the log a name, under which it stays.
func (l *Log) Save(path string) error {
	l.mu.Lock()
	parts, size := l.parts, l.size
	l.mu.Unlock()
	if last := len(parts) - 1; last > 0 && parts[last].base == 0 {
		if unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", parts[last].Fd()), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW) == nil {
			return nil
		}
	}
	// It is in memory, at least in part, or on another file system.
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("save the log of a step: %w", err)
	}
	_, err = io.Copy(f, io.NewSectionReader(wholeLog{l}, 0, size))
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("save the log of a step: %w", err)
	}
	return nil
}

// wholeLog reads across parts.
type wholeLog struct{ *Log }

func (l wholeLog) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) && err == nil {
		end := len(p)
		l.mu.Lock()
		for _, q := range l.parts { // a part ends where the next one begins
			if at := q.base - off; at > int64(n) {
				end = min(end, int(at))
			}
		}
		l.mu.Unlock()
		var m int
		m, err = l.Log.ReadAt(p[n:end], off+int64(n))
		n += m
	}
	return n, err
}

// Close lets go of the log.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var errs []error
	for _, p := range l.parts {
		errs = append(errs, p.Close())
	}
	l.parts, l.size = nil, 0
	return errors.Join(errs...)
}
