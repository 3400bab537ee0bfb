package footprint

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mapping is a range of addresses of this process.
type mapping struct {
	start, end uintptr
	file       uint64 // its inode; 0 for none
	permitted  string // r, w, x and p or s, each or a dash
	resident   int    // KiB of it that are mapped
	changed    int    // KiB that aren't what the file has
}

// dropFiles unmaps the pages of files, the program above all, that were never
// written to.
func dropFiles() error {
	all, err := fileMappings()
	if err != nil {
		return fmt.Errorf("look at the pages of files: %w", err)
	}
	for _, m := range all {
		if !m.disposable() || m.resident == 0 {
			continue
		}
		_, _, errno := unix.Syscall(unix.SYS_MADVISE, m.start, m.end-m.start, unix.MADV_DONTNEED)
		if errno != 0 {
			return fmt.Errorf("unmap pages of a file at %x: %w", m.start, errno)
		}
	}
	return nil
}

// disposable says whether all of m is as in the file, and stays so: then the
// kernel brings it back when it is touched.
func (m mapping) disposable() bool {
	return strings.HasPrefix(m.permitted, "r-") && m.changed == 0
}

// fileMappings are those of files.
func fileMappings() ([]mapping, error) {
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []mapping
	var m *mapping // the one whose lines are being read, if it is a file's
	for s := bufio.NewScanner(f); ; {
		if !s.Scan() {
			return out, s.Err()
		}
		fields := bytes.Fields(s.Bytes())
		switch {
		case len(fields) >= 5 && bytes.IndexByte(fields[0], '-') > 0:
			found, err := parseMapping(fields)
			if err != nil {
				return nil, err
			}
			if m = nil; found.file != 0 {
				out = append(out, found)
				m = &out[len(out)-1]
			}
		case m != nil && len(fields) == 3:
			n, err := strconv.Atoi(string(fields[1]))
			switch name := string(fields[0]); {
			case name != "Rss:" && name != "Anonymous:":
			case err != nil:
				return nil, fmt.Errorf("%s %w", name, err)
			case name == "Rss:":
				m.resident = n
			default:
				m.changed = n
			}
		}
	}
}

// parseMapping reads the first line of a mapping: addresses, permissions, offset,
// device, inode, and the file's name.
func parseMapping(fields [][]byte) (mapping, error) {
	from, to, _ := strings.Cut(string(fields[0]), "-")
	start, err := strconv.ParseUint(from, 16, int(8*unsafe.Sizeof(uintptr(0))))
	if err != nil {
		return mapping{}, err
	}
	end, err := strconv.ParseUint(to, 16, int(8*unsafe.Sizeof(uintptr(0))))
	if err != nil {
		return mapping{}, err
	}
	file, err := strconv.ParseUint(string(fields[4]), 10, 64)
	return mapping{start: uintptr(start), end: uintptr(end), file: file, permitted: string(fields[1])}, err
}
