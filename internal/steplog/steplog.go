// Package steplog stores all that a step prints, and has others read it while it
// is being written.
//
// A log is a sequence of chunks: what was printed to one stream at one time. It
// begins in memory, for most steps print little, and goes on in a file without a
// name, bounded by the disk alone. Writing never waits for whoever reads: readers
// are told how long the log is and read at their own speed, also from another
// process. A file without a name is gone with the last who has it open; Save gives
// the log one.
package steplog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Chunk is what was printed to a stream at a time: Size bytes of the log at Off.
type Chunk struct {
	Stream int
	Time   time.Time
	Off    int64
	Size   int
}

// headerSize is that of a chunk's header: stream, time in nanoseconds, size.
const headerSize = 1 + 8 + 4

func appendHeader(b []byte, stream int, now time.Time, size int) []byte {
	b = append(b, byte(stream))
	b = binary.LittleEndian.AppendUint64(b, uint64(now.UnixNano()))
	return binary.LittleEndian.AppendUint32(b, uint32(size))
}

// Part is where the log is from Base on, up to the Base of the next part. Its file
// isn't encoded with it: who sends it to another process sends that apart, see
// Extent.Files.
type Part struct {
	Base int64
	file *os.File
}

// Extent is what there is of a log. The zero value is an empty one.
type Extent struct {
	Parts []Part
	Size  int64
	Lost  string // why the end of the log is missing; "" if it isn't
}

const (
	// inMemory is how long a log in memory may get.
	inMemory = 256 << 10
	// inNeed is how long it may get when it can't be written to disk.
	inNeed = 1 << 20
)

// Writer writes a log. Its methods may be called from many goroutines.
type Writer struct {
	dir  string
	told func()

	mu    sync.Mutex // guards the fields below; held while writing
	parts []part
	size  int64
	err   error // of writing to disk
	lost  bool
}

// Files are those of the parts, which remain the writer's.
func (x Extent) Files() []*os.File {
	files := make([]*os.File, len(x.Parts))
	for i, p := range x.Parts {
		files[i] = p.file
	}
	return files
}

// With returns an extent that came without its files, with those of its last parts.
func (x Extent) With(files []*os.File) Extent {
	x.Parts = slices.Clone(x.Parts)
	for i := range files {
		x.Parts[len(x.Parts)-len(files)+i].file = files[i]
	}
	return x
}

// part is a file that holds the log from base on. It stays open as long as the
// writer is.
type part struct {
	*os.File
	base int64
}

// NewWriter returns a writer of an empty log, which will be on the file system of
// the directory dir. told is called after each write.
func NewWriter(dir string, told func()) *Writer { return &Writer{dir: dir, told: told} }

// Stream returns a writer for one of the log's streams, which never fails and
// doesn't wait for readers.
func (w *Writer) Stream(n int) io.Writer { return &stream{w, n} }

type stream struct {
	w *Writer
	n int
}

func (s *stream) Write(p []byte) (int, error) {
	s.w.add(s.n, time.Now(), p)
	s.w.told()
	return len(p), nil
}

func (w *Writer) add(stream int, now time.Time, p []byte) {
	if len(p) == 0 {
		return
	}
	head := appendHeader(make([]byte, 0, headerSize), stream, now, len(p))
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.lost {
		return
	}
	n := int64(len(head) + len(p))
	err := w.makeRoomLocked(n)
	if err == nil {
		err = w.writeLocked(head, p)
	}
	if err != nil && w.err == nil {
		// What the disk has no room for is kept in memory, for a while.
		w.err = err
		if err = w.memoryLocked(); err == nil {
			err = w.writeLocked(head, p)
		}
	}
	if err != nil {
		w.err, w.lost = errors.Join(w.err, err), true
		return
	}
	w.size += n
}

// makeRoomLocked chooses where the next n bytes go.
func (w *Writer) makeRoomLocked(n int64) error {
	if len(w.parts) == 0 {
		return w.memoryLocked()
	}
	last := w.parts[len(w.parts)-1]
	used := w.size - last.base + n
	switch {
	case w.err != nil && used > inNeed:
		return fmt.Errorf("the last %d bytes are all that is kept in memory", inNeed)
	case w.err == nil && len(w.parts) == 1 && used > inMemory:
		return w.spillLocked()
	}
	return nil
}

// memfdCreate is unix.MemfdCreate; a test makes it that of other kernels.
var memfdCreate = unix.MemfdCreate

// memoryLocked goes on in memory.
func (w *Writer) memoryLocked() error {
	// Where vm.memfd_noexec is 2, only memory that can't be executed is to be had;
	// kernels before 6.3 don't know that kind.
	fd, err := memfdCreate("step-log", unix.MFD_CLOEXEC|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) {
		fd, err = memfdCreate("step-log", unix.MFD_CLOEXEC)
	}
	if err != nil {
		return fmt.Errorf("make a log in memory: %w", err)
	}
	w.parts = append(w.parts, part{os.NewFile(uintptr(fd), "step log in memory"), w.size})
	return nil
}

// spillLocked copies the log from memory to disk, where it goes on.
func (w *Writer) spillLocked() error {
	fd, err := unix.Open(w.dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("make a file for the log in %s: %w", w.dir, err)
	}
	f := os.NewFile(uintptr(fd), "step log on disk")
	if _, err := io.Copy(f, io.NewSectionReader(w.parts[0], 0, w.size)); err != nil {
		return errors.Join(fmt.Errorf("write the log to %s: %w", w.dir, err), f.Close())
	}
	w.parts = append(w.parts, part{f, 0})
	return nil
}

func (w *Writer) writeLocked(head, p []byte) error {
	last := w.parts[len(w.parts)-1]
	n, err := unix.Pwritev(int(last.Fd()), [][]byte{head, p}, w.size-last.base)
	if err == nil && n < len(head)+len(p) {
		err = unix.ENOSPC
	}
	if err != nil {
		return fmt.Errorf("write log: %w", err)
	}
	return nil
}

// Extent returns what there is of the log now.
func (w *Writer) Extent() Extent {
	w.mu.Lock()
	defer w.mu.Unlock()
	x := Extent{Size: w.size}
	for _, p := range w.parts {
		x.Parts = append(x.Parts, Part{Base: p.base, file: p.File})
	}
	if w.lost {
		x.Lost = w.err.Error()
	}
	return x
}

// Close lets go of the log: who has it open keeps it.
func (w *Writer) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lost = true
	var errs []error
	for _, p := range w.parts {
		errs = append(errs, p.Close())
	}
	w.parts = nil
	return errors.Join(errs...)
}
