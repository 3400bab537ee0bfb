package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/kilnbuild/kiln/client"
	"github.com/urfave/cli/v3"
)

// connectionFlags say which daemon is meant, and how to reach it.
func connectionFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "addr", Usage: "address of the daemon (default: " + strings.Join(defaultAddresses(), " or ") + ", else a private daemon)", Sources: cli.EnvVars("BUILDKIT_HOST")},
		&cli.StringFlag{Name: "tlsservername", Usage: "server name of the daemon's certificate"},
		&cli.StringFlag{Name: "tlscacert", Usage: "CA certificate"},
		&cli.StringFlag{Name: "tlscert", Usage: "client certificate"},
		&cli.StringFlag{Name: "tlskey", Usage: "client key"},
		&cli.StringFlag{Name: "tlsdir", Usage: "directory with ca.pem, cert.pem and key.pem"},
		&cli.IntFlag{Name: "timeout", Usage: "seconds to wait for the daemon", Value: 5},
		&cli.BoolFlag{Name: "wait", Usage: "wait until the daemon is reachable"},
	}
}

// connect returns a client of the daemon that the flags name, starting a
// private one if none is named and none listens at the default address.
func connect(ctx context.Context, c *cli.Command) (*client.Client, error) {
	timeout := time.Duration(c.Int("timeout")) * time.Second
	addr, why := c.String("addr"), "given"
	if addr == "" {
		var err error
		if addr, why, err = findDaemon(ctx, c.Bool("no-autostart"), timeout); err != nil {
			return nil, err
		}
	}
	if c.Bool("debug") {
		fmt.Fprintf(os.Stderr, "daemon: %s (%s)\n", addr, why)
	}
	if err := reachable(ctx, addr, timeout, c.Bool("wait")); err != nil {
		return nil, err
	}
	tlsConf, err := tlsConfig(c)
	if err != nil {
		return nil, err
	}
	return client.New(addr, client.Options{TLS: tlsConf})
}

// reachable tries to connect, so that a missing daemon is named as the cause
// and not found out by a request in the middle. With wait it goes on trying.
func reachable(ctx context.Context, addr string, timeout time.Duration, wait bool) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	retry := time.NewTicker(10 * time.Millisecond)
	defer retry.Stop()
	for {
		err := dial(ctx, addr)
		if err == nil {
			return nil
		}
		if !wait {
			return fmt.Errorf("no daemon at %s: %w; start kilnd, or name another with --addr", addr, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("no daemon at %s after %s: %w", addr, timeout, err)
		case <-retry.C:
		}
	}
}

func dial(ctx context.Context, addr string) error {
	proto, rest, ok := strings.Cut(addr, "://")
	if !ok || (proto != "unix" && proto != "tcp") {
		return errors.New("an address is unix:///path or tcp://host:port")
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, proto, rest)
	if err != nil {
		return err
	}
	return conn.Close()
}

// tlsConfig reads the TLS flags (BCL-002, -003); nil if none is set.
func tlsConfig(c *cli.Command) (*tls.Config, error) {
	ca, cert, key := c.String("tlscacert"), c.String("tlscert"), c.String("tlskey")
	if dir := c.String("tlsdir"); dir != "" {
		if ca != "" || cert != "" || key != "" {
			return nil, errors.New("--tlsdir and --tlscacert, --tlscert, --tlskey exclude each other")
		}
		var errs [3]error
		ca, errs[0] = firstOf(dir, "ca.pem", "ca.crt")
		cert, errs[1] = firstOf(dir, "cert.pem", "tls.crt")
		key, errs[2] = firstOf(dir, "key.pem", "tls.key")
		if err := errors.Join(errs[:]...); err != nil {
			return nil, err
		}
	}
	if ca == "" && cert == "" && key == "" && c.String("tlsservername") == "" {
		return nil, nil
	}
	conf := &tls.Config{ServerName: c.String("tlsservername"), MinVersion: tls.VersionTLS12}
	if ca != "" {
		pem, err := os.ReadFile(ca)
		if err != nil {
			return nil, fmt.Errorf("read CA certificate: %w", err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("read CA certificate %s: no certificate in it", ca)
		}
	}
	if cert != "" || key != "" {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return nil, fmt.Errorf("load client certificate %q and key %q: %w", cert, key, err)
		}
		conf.Certificates = []tls.Certificate{pair}
	}
	return conf, nil
}

// firstOf is the first of the names that dir has. A missing file is an error:
// without it the connection would be less than what was asked for.
func firstOf(dir string, names ...string) (string, error) {
	for _, n := range names {
		if path := filepath.Join(dir, n); fileExists(path) {
			return path, nil
		}
	}
	return "", fmt.Errorf("--tlsdir %s: it has no %s", dir, strings.Join(names, " or "))
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
