package supervisor

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// tailSize is how much is kept of the end of a stream that is longer than what
// is kept of its beginning: what ops shows of clipped output.
const tailSize = 256 << 10

// keptLog is what a step has printed: of each stream the first bytes, in a file
// without a name, and the last ones.
//
// The file is a sequence of chunks: a byte for the stream, four for the length,
// and the data. It is made when the step first prints.
type keptLog struct {
	dir  string
	keep int // bytes of each stream; -1 is all
	file *os.File
	size int64
	seen [3]int    // by stream: bytes in the file
	tail [3][]byte // by stream: what came after them; up to twice its size before it is cut
	err  error     // why the file is incomplete
}

const chunkHeader = 5

func (l *keptLog) add(stream int, p []byte) {
	room := len(p)
	if l.keep >= 0 {
		room = max(0, min(room, l.keep-l.seen[stream]))
	}
	if room > 0 && l.err == nil {
		l.err = l.write(stream, p[:room])
	}
	l.seen[stream] += room
	if rest := p[room:]; len(rest) > 0 {
		t := append(l.tail[stream], rest...)
		if len(t) > 2*tailSize {
			t = append(t[:0], t[len(t)-tailSize:]...)
		}
		l.tail[stream] = t
	}
}

func (l *keptLog) write(stream int, p []byte) error {
	if l.file == nil {
		fd, err := unix.Open(l.dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return fmt.Errorf("make a file for the log in %s: %w", l.dir, err)
		}
		l.file = os.NewFile(uintptr(fd), "step log")
	}
	head := binary.LittleEndian.AppendUint32([]byte{byte(stream)}, uint32(len(p)))
	n, err := unix.Pwritev(int(l.file.Fd()), [][]byte{head, p}, l.size)
	if err == nil && n < len(head)+len(p) {
		err = io.ErrShortWrite
	}
	if err != nil {
		return fmt.Errorf("write log: %w", err)
	}
	l.size += int64(n)
	return nil
}

// replay passes on all that is kept. What is missing is said.
func (l *keptLog) replay(send func(stream int, p []byte) error) error {
	if l.file != nil {
		if err := l.chunks(send); err != nil {
			return err
		}
	}
	for stream, t := range l.tail {
		if t = t[max(0, len(t)-tailSize):]; len(t) > 0 {
			if err := send(stream, t); err != nil {
				return err
			}
		}
	}
	if l.err != nil {
		return send(2, []byte("[output is missing here: "+l.err.Error()+"]\n"))
	}
	return nil
}

func (l *keptLog) chunks(send func(stream int, p []byte) error) error {
	r := io.NewSectionReader(l.file, 0, l.size)
	var head [chunkHeader]byte
	for {
		if _, err := io.ReadFull(r, head[:]); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		p := make([]byte, binary.LittleEndian.Uint32(head[1:]))
		if _, err := io.ReadFull(r, p); err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		if err := send(int(head[0]), p); err != nil {
			return err
		}
	}
}

func (l *keptLog) close() error {
	if l.file == nil {
		return nil
	}
	return l.file.Close()
}
