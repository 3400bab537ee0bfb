package executor

import (
	"context"
	"errors"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// gate is a writer that waits to be opened.
type gate struct {
	reached chan struct{} // gets a value for each Write
	open    chan struct{}
	got     []byte
}

func (g *gate) Write(p []byte) (int, error) {
	g.reached <- struct{}{}
	<-g.open
	g.got = append(g.got, p...)
	return len(p), nil
}

// What a process wrote before its end is handed over when it was cancelled, too:
// also if others still have its output open.
func TestLastWords(t *testing.T) {
	g := &gate{reached: make(chan struct{}, 2), open: make(chan struct{})}
	s, err := newStdio(Process{Stdout: g})
	if err != nil {
		t.Fatal(err)
	}
	other, err := unix.Dup(s.child[1])
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(other)
	write := func(text string) {
		t.Helper()
		if _, err := unix.Write(other, []byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	write("ready\n")
	if err := s.started(); err != nil {
		t.Fatal(err)
	}
	<-g.reached
	write("bye\n")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	ended := make(chan error)
	go func() { ended <- s.ended(ctx) }()
	conn, err := s.outputs[0].SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	// Reading waits no more before the first words are taken.
	for !errors.Is(err, os.ErrDeadlineExceeded) {
		err = conn.Read(func(uintptr) bool { return true })
		runtime.Gosched()
	}
	close(g.open)
	if err := <-ended; err != nil || string(g.got) != "ready\nbye\n" {
		t.Errorf("handed over: %q, %v", g.got, err)
	}
}
