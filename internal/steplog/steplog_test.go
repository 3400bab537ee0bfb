package steplog

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// read returns what each stream printed, and in what order.
func read(t *testing.T, l *Log) (streams [3]string, order string) {
	t.Helper()
	var bufs [3]bytes.Buffer
	for off := int64(0); ; {
		c, next, err := l.Next(off)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := l.Data(c, c.Size)
		if err != nil {
			t.Fatal(err)
		}
		bufs[c.Stream].Write(data)
		if !strings.HasSuffix(order, fmt.Sprint(c.Stream)) {
			order += fmt.Sprint(c.Stream)
		}
		off = next
	}
	return [3]string{1: bufs[1].String(), 2: bufs[2].String()}, order
}

// A log is whole however long it is, for a reader that is told of each step and
// for one that comes late, and so is its saved copy.
func TestLogIsWhole(t *testing.T) {
	for _, size := range []int{0, 10, inMemory - headerSize, inMemory, 5 * inMemory} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			dir := t.TempDir()
			var early Log
			var w *Writer
			w = NewWriter(dir, func() {
				if err := early.Grow(w.Extent()); err != nil {
					t.Error(err)
				}
			})
			defer w.Close()
			want := ""
			fmt.Fprint(w.Stream(2), "warned")
			for i := 0; len(want) < size; i++ {
				piece := strings.Repeat(fmt.Sprint(i%10), min(32<<10, size-len(want)))
				want += piece
				fmt.Fprint(w.Stream(1), piece)
			}
			fmt.Fprint(w.Stream(2), "end")
			var late Log
			if err := late.Grow(w.Extent()); err != nil {
				t.Fatal(err)
			}
			if err := late.Save(filepath.Join(dir, "saved")); err != nil {
				t.Fatal(err)
			}
			saved, err := Open(filepath.Join(dir, "saved"))
			if err != nil {
				t.Fatal(err)
			}
			if err := w.Close(); err != nil {
				t.Error(err)
			}
			for name, l := range map[string]*Log{"early": &early, "late": &late, "saved": saved} {
				got, order := read(t, l)
				if got[1] != want || got[2] != "warnedend" || size > 0 && order != "212" {
					t.Errorf("%s: %d bytes, %q, in order %s", name, len(got[1]), got[2], order)
				}
				if err := l.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// Without a disk the beginning is kept in memory, and that the rest is lost is
// told.
func TestLogWithoutDisk(t *testing.T) {
	w := NewWriter("/no/such/directory", func() {})
	defer w.Close()
	for range 3 * inNeed >> 10 {
		w.Stream(1).Write(bytes.Repeat([]byte("x"), 1<<10)) //nolint:errcheck // it never fails
	}
	x := w.Extent()
	var l Log
	defer l.Close()
	if err := l.Grow(x); err != nil {
		t.Fatal(err)
	}
	got, _ := read(t, &l)
	if len(got[1]) < inNeed || len(got[1]) > 2*inNeed || !strings.Contains(x.Lost, "/no/such/directory") {
		t.Errorf("%d bytes, lost: %q", len(got[1]), x.Lost)
	}
	saved := filepath.Join(t.TempDir(), "saved")
	if err := l.Save(saved); err != nil {
		t.Fatal(err)
	}
	again, err := Open(saved)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if same, _ := read(t, again); same != got {
		t.Errorf("saved %d bytes of %d", len(same[1]), len(got[1]))
	}
}

// What was cut off ends with its last whole chunk, and a part without its file is
// an error.
func TestBadLogs(t *testing.T) {
	w := NewWriter(t.TempDir(), func() {})
	defer w.Close()
	fmt.Fprint(w.Stream(1), "whole")
	fmt.Fprint(w.Stream(1), "cut off")
	var l Log
	defer l.Close()
	if err := l.Grow(w.Extent()); err != nil {
		t.Fatal(err)
	}
	saved := filepath.Join(t.TempDir(), "saved")
	if err := errors.Join(l.Save(saved), os.Truncate(saved, w.Extent().Size-1)); err != nil {
		t.Fatal(err)
	}
	cut, err := Open(saved)
	if err != nil {
		t.Fatal(err)
	}
	defer cut.Close()
	if got, _ := read(t, cut); got[1] != "whole" {
		t.Errorf("read %q", got[1])
	}
	if err := new(Log).Grow(w.Extent().With([]*os.File{nil})); err == nil || !strings.Contains(err.Error(), "without its file") {
		t.Errorf("error %v", err)
	}
}

// A log begins in memory on kernels that know no memory without execution, and on
// those that allow no other.
func TestMemoryOfOtherKernels(t *testing.T) {
	defer func() { memfdCreate = unix.MemfdCreate }()
	for name, refuse := range map[string]func(flags int) error{
		"before 6.3":        func(flags int) error { return errIf(flags&unix.MFD_NOEXEC_SEAL != 0, unix.EINVAL) },
		"vm.memfd_noexec=2": func(flags int) error { return errIf(flags&unix.MFD_NOEXEC_SEAL == 0, unix.EACCES) },
	} {
		memfdCreate = func(name string, flags int) (int, error) {
			if err := refuse(flags); err != nil {
				return -1, err
			}
			return unix.MemfdCreate(name, unix.MFD_CLOEXEC)
		}
		w := NewWriter(t.TempDir(), func() {})
		if _, err := w.Stream(1).Write([]byte("x\n")); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if w.err != nil || w.size == 0 {
			t.Errorf("%s: size %d, %v", name, w.size, w.err)
		}
		if err := w.Close(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func errIf(condition bool, err error) error {
	if condition {
		return err
	}
	return nil
}
