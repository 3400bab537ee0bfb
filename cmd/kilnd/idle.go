package main

import (
	"net"
	"sync"
	"time"
)

// idleWatch counts connections. idle gets a word when there were none for d.
type idleWatch struct {
	d    time.Duration
	idle chan struct{} // of capacity 1

	mu    sync.Mutex // guards the fields below
	conns int
	timer *time.Timer
}

func newIdleWatch(d time.Duration) *idleWatch {
	w := &idleWatch{d: d, idle: make(chan struct{}, 1)}
	w.mu.Lock() // the timer may fire before it is assigned
	defer w.mu.Unlock()
	w.timer = time.AfterFunc(d, w.expire)
	return w
}

func (w *idleWatch) expire() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.conns > 0 {
		return
	}
	select {
	case w.idle <- struct{}{}:
	default:
	}
}

func (w *idleWatch) opened() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.conns++
	w.timer.Stop()
}

func (w *idleWatch) closed() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.conns--; w.conns == 0 {
		w.timer.Reset(w.d)
	}
}

// watched is a listener whose connections are counted.
type watched struct {
	net.Listener
	watch *idleWatch
}

func (l watched) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.watch.opened()
	return &watchedConn{Conn: c, watch: l.watch}, nil
}

type watchedConn struct {
	net.Conn
	watch *idleWatch
	once  sync.Once
}

func (c *watchedConn) Close() error {
	c.once.Do(c.watch.closed)
	return c.Conn.Close()
}
