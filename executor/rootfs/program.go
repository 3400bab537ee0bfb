package rootfs

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Program is what a file is to one who wants to execute it.
type Program struct {
	Path string // as it was asked for
	Mode fs.FileMode
	Size int64
	// Interpreter is the program that a script's first line names, as it is
	// written there, or the loader of a binary; "" for none.
	Interpreter string
	Script      bool
	Binary      bool        // an ELF file, for Machine
	Machine     elf.Machine // of a binary
	Class       elf.Class
}

// firstLine is how much of a script the kernel reads for its first line.
const firstLine = 256

// Program looks at the file at name, which is followed if it is a link. It reads
// only regular files, so that nothing happens by that.
func (r Root) Program(name string) (Program, error) {
	p := Program{Path: name}
	fd, err := r.open(name, unix.O_PATH)
	if err != nil {
		return p, err
	}
	at := os.NewFile(uintptr(fd), name)
	defer at.Close()
	st, err := at.Stat()
	if err != nil {
		return p, err
	}
	p.Mode, p.Size = st.Mode(), st.Size()
	if !p.Mode.IsRegular() {
		return p, nil
	}
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return p, err
	}
	defer f.Close()
	return p, p.read(f)
}

func (p *Program) read(f io.ReaderAt) error {
	head := make([]byte, firstLine)
	n, err := f.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		return err
	}
	head = head[:n]
	switch {
	case bytes.HasPrefix(head, []byte("#!")):
		p.Script = true
		line, _, _ := strings.Cut(string(head[2:]), "\n")
		line = strings.TrimLeft(line, " \t")
		if i := strings.IndexAny(line, " \t"); i >= 0 {
			line = line[:i]
		}
		p.Interpreter = line
	case bytes.HasPrefix(head, []byte(elf.ELFMAG)):
		return p.readELF(f)
	}
	return nil
}

// readELF reads the header. A file that only begins like a binary isn't one.
func (p *Program) readELF(f io.ReaderAt) error {
	bin, err := elf.NewFile(f)
	if err != nil {
		return nil
	}
	defer bin.Close()
	p.Binary, p.Machine, p.Class = true, bin.Machine, bin.Class
	for _, prog := range bin.Progs {
		if prog.Type != elf.PT_INTERP {
			continue
		}
		loader := make([]byte, min(prog.Filesz, unix.PathMax))
		if _, err := prog.ReadAt(loader, 0); err != nil && err != io.EOF {
			return nil
		}
		p.Interpreter, _, _ = strings.Cut(string(loader), "\x00")
	}
	return nil
}
