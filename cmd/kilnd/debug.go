package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"
)

// listenDebug opens the listener of the debug pages (DMN-006): a host:port or a
// URL as for --addr. There is no TLS on it.
func listenDebug(cfg *config) (net.Listener, error) {
	addr := cfg.GRPC.DebugAddress
	proto, rest, ok := strings.Cut(addr, "://")
	if !ok {
		proto, rest = "tcp", addr
	}
	var l net.Listener
	var err error
	switch proto {
	case "unix":
		l, err = listenUnix(rest, cfg)
	case "tcp":
		l, err = net.Listen("tcp", rest)
	default:
		err = errors.New("an address is host:port, tcp://host:port or unix:///path")
	}
	if err != nil {
		return nil, fmt.Errorf("listen on the debug address %s: %w", addr, err)
	}
	return l, nil
}

// serveDebug serves pages on l until stop is called.
func serveDebug(l net.Listener, pages http.Handler, log *slog.Logger) (stop func() error) {
	srv := &http.Server{Handler: pages, ReadHeaderTimeout: time.Minute, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			log.Error("the debug address is no longer served", "address", l.Addr().String(), "error", err)
		}
	}()
	log.Info("serving metrics and debug pages", "address", l.Addr().String())
	return func() error {
		err := srv.Close()
		<-done
		return err
	}
}
