package main

import (
	"os"
	"os/signal"
	"syscall"

	"github.com/containerd/console"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
)

// terminalSizes tells the size of term, and every change of it, until stop.
func terminalSizes(term console.Console) (sizes <-chan *gwpb.ExecMessage, stop func()) {
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGWINCH)
	out, over, done := make(chan *gwpb.ExecMessage), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			if size, err := term.Size(); err == nil { // none is a terminal that has gone
				msg := &gwpb.ExecMessage{Input: &gwpb.ExecMessage_Resize{
					Resize: &gwpb.ResizeMessage{Rows: uint32(size.Height), Cols: uint32(size.Width)},
				}}
				select {
				case out <- msg:
				case <-over:
					return
				}
			}
			select {
			case <-changed:
			case <-over:
				return
			}
		}
	}()
	return out, func() {
		signal.Stop(changed)
		close(over)
		<-done
	}
}
