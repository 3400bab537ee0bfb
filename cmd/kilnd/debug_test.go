package main

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
)

func TestCacheVerifyShare(t *testing.T) {
	for _, c := range []struct {
		file string
		args []string
		want float64
	}{
		{"", nil, 0},
		{"[cache]\nverify = 0.25", nil, 0.25},
		{"[cache]\nverify = 1", nil, 1},
		{"[cache]\nverify = 0.25", []string{"--cache-verify=0.1"}, 0.1},
		{"[cache]\nverify = 0.25", []string{"--cache-verify", "0"}, 0},
	} {
		cfg, warnings, err := loaded(t, c.file, c.args...)
		if err != nil || len(warnings) > 0 || cfg.Cache.Verify != c.want {
			t.Errorf("%q %q: %v, %q, %v; want %v", c.file, c.args, cfg, warnings, err, c.want)
		}
	}
	for _, c := range []struct {
		file string
		args []string
	}{{"[cache]\nverify = 2", nil}, {"[cache]\nverify = -0.1", nil}, {"", []string{"--cache-verify=10"}}, {"", []string{"--cache-verify=NaN"}}} {
		if _, _, err := loaded(t, c.file, c.args...); err == nil || !strings.Contains(err.Error(), "from 0 to 1") {
			t.Errorf("%q %q: error %v", c.file, c.args, err)
		}
	}
	for _, file := range []string{"[cache]\nverify = \"often\"", "[cache]\nverfy = 1"} {
		if _, _, err := loaded(t, file); err == nil || !strings.Contains(err.Error(), "ver") {
			t.Errorf("%q: error %v", file, err)
		}
	}
}

func TestRecordBuilds(t *testing.T) {
	for _, c := range []struct {
		file string
		args []string
		want string
	}{
		{"", nil, ""},
		{"[kiln]\nrecordBuilds = \"/a\"", nil, "/a"},
		{"[kiln]\nrecordBuilds = \"/a\"", []string{"--record-builds=/b"}, "/b"},
		{"[kiln]\nrecordBuilds = \"/a\"", []string{"--record-builds", ""}, ""},
	} {
		cfg, warnings, err := loaded(t, c.file, c.args...)
		if err != nil || len(warnings) > 0 || cfg.Kiln.RecordBuilds != c.want {
			t.Errorf("%q %q: %v, %q, %v; want %q", c.file, c.args, cfg, warnings, err, c.want)
		}
	}
}

// compat: DMN-006
func TestDebugAddress(t *testing.T) {
	cfg, _, err := loaded(t, "")
	must(t, err)
	if cfg.GRPC.DebugAddress != "" {
		t.Errorf("by default the debug address is %q", cfg.GRPC.DebugAddress)
	}
	cfg, warnings, err := loaded(t, "[grpc]\ndebugAddress = \"1.2.3.4:5\"")
	if must(t, err); cfg.GRPC.DebugAddress != "1.2.3.4:5" || len(warnings) > 0 {
		t.Errorf("of the file: %q, %q", cfg.GRPC.DebugAddress, warnings)
	}
	t.Setenv("BUILDKITD_DEBUGADDR", "env:1")
	cfg, _, err = loaded(t, "")
	if must(t, err); cfg.GRPC.DebugAddress != "env:1" {
		t.Errorf("of the environment: %q", cfg.GRPC.DebugAddress)
	}

	socket := filepath.Join(t.TempDir(), "debug")
	for _, addr := range []string{"127.0.0.1:0", "tcp://127.0.0.1:0", "unix://" + socket} {
		cfg.GRPC.DebugAddress = addr
		l, err := listenDebug(cfg)
		must(t, err)
		stop := serveDebug(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "page") }), slog.New(slog.DiscardHandler))
		client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, l.Addr().Network(), l.Addr().String())
		}}}
		resp, err := client.Get("http://debug/")
		must(t, err)
		body, err := io.ReadAll(resp.Body)
		must(t, err)
		resp.Body.Close()
		if string(body) != "page" {
			t.Errorf("%s serves %q", addr, body)
		}
		must(t, stop())
		if _, err := client.Get("http://debug/"); err == nil {
			t.Errorf("%s is served after the end", addr)
		}
	}
	for _, addr := range []string{"http://x", "127.0.0.1", "tcp://127.0.0.1:http-no"} {
		cfg.GRPC.DebugAddress = addr
		if l, err := listenDebug(cfg); err == nil {
			l.Close()
			t.Errorf("listens on %s", addr)
		} else if !strings.Contains(err.Error(), addr) {
			t.Errorf("%s: error %v", addr, err)
		}
	}
}
