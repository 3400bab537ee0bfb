package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/kilnbuild/kiln/internal/rootless"
)

// listen opens a listener for every address.
func listen(cfg *config, log *slog.Logger) (_ []net.Listener, err error) {
	var out []net.Listener
	defer func() {
		if err != nil {
			for _, l := range out {
				err = errors.Join(err, l.Close())
			}
		}
	}()
	for _, addr := range cfg.GRPC.Address {
		l, err := listenOn(addr, cfg, log)
		if err != nil {
			if rootless.Here().Mapped() && errors.Is(err, os.ErrPermission) {
				err = fmt.Errorf("%w; name a socket in a directory of the user's own with --addr, or the directory with XDG_RUNTIME_DIR", err)
			}
			return out, fmt.Errorf("listen on %s: %w", addr, err)
		}
		out = append(out, l)
	}
	return out, nil
}

func listenOn(addr string, cfg *config, log *slog.Logger) (net.Listener, error) {
	proto, rest, ok := strings.Cut(addr, "://")
	if !ok || rest == "" {
		return nil, errors.New("an address is unix:///path or tcp://host:port")
	}
	switch proto {
	case "unix":
		if cfg.GRPC.TLS.Cert != "" {
			log.Warn("TLS is not used on unix sockets", "address", addr)
		}
		return listenUnix(rest, cfg)
	case "tcp":
		l, err := net.Listen("tcp", rest)
		if err != nil {
			return nil, err
		}
		if cfg.GRPC.TLS.Cert == "" {
			log.Warn("TLS is not enabled: anyone who reaches this address controls the daemon; use --tlscert, --tlskey and --tlscacert", "address", addr)
			return l, nil
		}
		creds, err := tlsConfig(cfg)
		if err != nil {
			return nil, errors.Join(err, l.Close())
		}
		return tls.NewListener(l, creds), nil
	}
	return nil, fmt.Errorf("protocol %q is not supported; there are unix and tcp", proto)
}

// listenUnix replaces a socket that no daemon listens on any more (DMN-111).
func listenUnix(path string, cfg *config) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, err
	}
	if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
		return nil, errors.Join(errors.New("another daemon listens there"), conn.Close())
	}
	switch st, err := os.Lstat(path); {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return nil, err
	case st.Mode().Type() != os.ModeSocket:
		return nil, fmt.Errorf("%s exists and is no socket", path)
	default:
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("replace a socket that nobody listens on: %w", err)
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	uid, gid, err := socketOwner(cfg)
	if err == nil {
		err = errors.Join(rootless.Here().Explain(os.Chown(path, uid, gid), uid, gid), os.Chmod(path, 0o660))
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func socketOwner(cfg *config) (uid, gid int, err error) {
	uid, gid = os.Getuid(), os.Getgid()
	if cfg.GRPC.UID != nil {
		uid = *cfg.GRPC.UID
	}
	if cfg.GRPC.GID != nil {
		gid = *cfg.GRPC.GID
	}
	if cfg.group == "" {
		return uid, gid, nil
	}
	id := cfg.group
	if g, err := user.LookupGroup(cfg.group); err == nil {
		id = g.Gid
	}
	if gid, err = strconv.Atoi(id); err != nil {
		return 0, 0, fmt.Errorf("--group %s: no group of that name, and not a number", cfg.group)
	}
	return uid, gid, nil
}

func tlsConfig(cfg *config) (*tls.Config, error) {
	t := cfg.GRPC.TLS
	cert, err := tls.LoadX509KeyPair(t.Cert, t.Key)
	if err != nil {
		return nil, fmt.Errorf("load TLS certificate %s and key %s: %w", t.Cert, t.Key, err)
	}
	out := &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2"}}
	if t.CA != "" {
		pem, err := os.ReadFile(t.CA)
		if err != nil {
			return nil, fmt.Errorf("load TLS CA certificate: %w", err)
		}
		out.ClientCAs = x509.NewCertPool()
		if !out.ClientCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("load TLS CA certificate %s: no certificate in it", t.CA)
		}
		out.ClientAuth = tls.RequireAndVerifyClientCert
	}
	return out, nil
}
