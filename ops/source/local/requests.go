package local

import (
	"context"
	"sync"
	"time"

	"github.com/tonistiigi/fsutil/types"
)

// requests sends what the receiver has to say, in order, without making it
// wait.
type requests struct {
	cancel context.CancelCauseFunc
	ended  chan struct{}
	wake   chan struct{}

	mu    sync.Mutex // guards the fields below
	queue []*types.Packet
	last  bool
	err   error
}

func startRequests(ctx context.Context, cancel context.CancelCauseFunc, s stream) *requests {
	q := &requests{cancel: cancel, ended: make(chan struct{}), wake: make(chan struct{}, 1)}
	go q.run(ctx, s)
	return q
}

func (q *requests) run(ctx context.Context, s stream) {
	defer close(q.ended)
	for {
		q.mu.Lock()
		batch, last := q.queue, q.last
		q.queue = nil
		q.mu.Unlock()
		for _, p := range batch {
			if err := s.SendMsg(p); err != nil {
				// The reader gets the reason from the stream.
				q.mu.Lock()
				q.err = err
				q.mu.Unlock()
				return
			}
		}
		if last {
			return
		}
		select {
		case <-q.wake:
		case <-ctx.Done():
			return
		}
	}
}

func (q *requests) push(last bool, p *types.Packet) {
	q.mu.Lock()
	q.queue = append(q.queue, p)
	q.last = last
	q.mu.Unlock()
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// add asks for the data of the id-th entry.
func (q *requests) add(id uint32) { q.push(false, &types.Packet{Type: types.PACKET_REQ, ID: id}) }

// done tells the client that everything arrived, and waits until that is sent.
func (q *requests) done() error {
	q.push(true, &types.Packet{Type: types.PACKET_FIN})
	<-q.ended
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.err
}

// fail tells the client why the transfer ends, unless it doesn't listen.
func (q *requests) fail(err error) {
	q.push(true, &types.Packet{Type: types.PACKET_ERR, Data: []byte(err.Error())})
	t := time.NewTimer(time.Second)
	defer t.Stop()
	select {
	case <-q.ended:
	case <-t.C:
	}
	q.cancel(err)
	<-q.ended
}
