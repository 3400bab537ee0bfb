package footprint

import (
	"sync/atomic"
	"testing"
	"time"
	"unsafe"
)

// Pages of the program that all were in memory aren't any more, and what is
// executed and read next is right.
func TestProgramIsDropped(t *testing.T) {
	before := residentPages(t, true)
	if err := dropFiles(); err != nil {
		t.Fatal(err)
	}
	after := residentPages(t, false)
	if before == 0 || after >= before {
		t.Errorf("%d KiB of the program are in memory, and %d were before", after, before)
	}
	if sum := touchAll(t); sum == 0 {
		t.Error("the program is all zeros")
	}
}

// residentPages is what of the disposable mappings is in memory, all of it if
// touched.
func residentPages(t *testing.T, touch bool) (kb int) {
	t.Helper()
	if touch {
		touchAll(t)
	}
	all, err := fileMappings()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		if m.disposable() {
			kb += m.resident
		}
	}
	return kb
}

func touchAll(t *testing.T) (sum int) {
	t.Helper()
	all, err := fileMappings()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		if !m.disposable() {
			continue
		}
		// The addresses are those of the program's file, not of Go's heap.
		data := unsafe.Slice(*(**byte)(unsafe.Pointer(&m.start)), m.end-m.start)
		for i := 0; i < len(data); i += 4096 {
			sum += int(data[i])
		}
	}
	return sum
}

// What was written to, or may be, is no longer in the file.
func TestChangedPagesStay(t *testing.T) {
	for _, tt := range []struct {
		permitted string
		changed   int
		want      bool
	}{
		{"r-xp", 0, true},
		{"r--p", 0, true},
		{"r--p", 4, false}, // relocated, and read-only since
		{"rw-p", 0, false},
		{"---p", 0, false},
	} {
		if got := (mapping{permitted: tt.permitted, changed: tt.changed}).disposable(); got != tt.want {
			t.Errorf("%s with %d KiB changed: %v", tt.permitted, tt.changed, got)
		}
	}
	all, err := fileMappings()
	if err != nil {
		t.Fatal(err)
	}
	kept := false
	for _, m := range all {
		kept = kept || !m.disposable()
	}
	if !kept {
		t.Errorf("all mappings of the program are disposable, its variables, too: %+v", all)
	}
}

// Memory is given back when nothing runs, and the end of what runs asks again.
func TestKeeper(t *testing.T) {
	var busy atomic.Bool
	asked := make(chan bool, 10)
	var rested atomic.Int32
	k := Keep(0, Config{
		Busy: func() bool {
			b := busy.Load()
			asked <- true // from here on the test may change it
			return b
		},
		Rest: func() { rested.Add(1) },
		Tell: func(err error) { t.Error(err) },
	})
	await := func() {
		t.Helper()
		select {
		case <-asked:
		case <-time.After(30 * time.Second):
			t.Fatal("nobody asked whether something runs")
		}
	}
	await()
	busy.Store(true)
	k.Used(0)
	await()
	k.Close()
	if n := rested.Load(); n != 1 {
		t.Errorf("rested %d times, want once: the second time something ran", n)
	}
	k.Used(0)
	if k.timer.Stop() {
		t.Error("a closed keeper waits")
	}
}
