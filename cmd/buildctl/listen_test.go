package main

import (
	"io"
	"net"
	"testing"
)

func listenUnix(t *testing.T, path string) io.Closer {
	t.Helper()
	l, err := net.Listen("unix", path)
	must(t, err)
	return l
}
