package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/executor/network"
	"github.com/kilnbuild/kiln/internal/rootless"
	"github.com/kilnbuild/kiln/ops"
	"github.com/urfave/cli/v3"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// loaded reads the config that a file of the given content and args make.
func loaded(t *testing.T, file string, args ...string) (cfg *config, warnings []string, err error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c.toml")
	must(t, os.WriteFile(path, []byte(file), 0o600))
	cmd := command()
	cmd.Commands = nil
	cmd.Writer, cmd.ErrWriter = io.Discard, io.Discard
	cmd.Action = func(_ context.Context, c *cli.Command) (err error) {
		cfg, warnings, err = loadConfig(c)
		return err
	}
	err = cmd.Run(t.Context(), append([]string{"kilnd", "--config", path}, args...))
	return cfg, warnings, err
}

// compat: DMN-023
func TestPrecedence(t *testing.T) {
	cfg, _, err := loaded(t, "")
	must(t, err)
	if paths := rootless.Defaults(); cfg.Root != paths.Root || !slices.Equal(cfg.GRPC.Address, []string{paths.Address}) || cfg.historyAge != 48*time.Hour || cfg.History.MaxEntries != 50 || cfg.maxLogs != 1<<30 ||
		cfg.Log.Format != "text" || cfg.Worker.OCI.Snapshotter != "auto" || cfg.grace != defaultGrace {
		t.Errorf("defaults %+v", cfg)
	}
	const file = `
root = "/file"
insecure-entitlements = ["device"]
[grpc]
address = ["tcp://file"]
[log]
format = "json"
[worker.oci]
max-parallelism = 3
platforms = ["linux/arm64"]
[worker.oci.labels]
from = "file"
both = "file"
`
	cfg, _, err = loaded(t, file)
	must(t, err)
	if cfg.Root != "/file" || cfg.GRPC.Address[0] != "tcp://file" || cfg.Log.Format != "json" || cfg.Worker.OCI.MaxParallelism != 3 || cfg.InsecureEntitlements[0] != "device" {
		t.Errorf("file %+v", cfg)
	}
	cfg, _, err = loaded(t, file, "--root", "/flag", "--addr", "unix:///a,b", "--addr", "unix:///c", "--oci-max-parallelism", "0", "--log-format", "text",
		"--allow-insecure-entitlement", "network.host", "--oci-worker-labels", "both=flag,x")
	must(t, err)
	oci := cfg.Worker.OCI
	if cfg.Root != "/flag" || !slices.Equal(cfg.GRPC.Address, []string{"unix:///a,b", "unix:///c"}) || oci.MaxParallelism != 0 || cfg.Log.Format != "text" ||
		!slices.Equal(cfg.InsecureEntitlements, []string{"network.host"}) || oci.Labels["both"] != "flag,x" || oci.Labels["from"] != "file" || oci.Platforms[0] != "linux/arm64" {
		t.Errorf("flags %+v", cfg)
	}
}

func TestBadConfig(t *testing.T) {
	for _, c := range []struct {
		file string
		args []string
		want []string
	}{
		{"rot = 1", nil, []string{"unknown key rot", "root"}},
		{"[worker.oci]\nmax-paralelism = 1", nil, []string{"worker.oci.max-paralelism", "worker.oci.max-parallelism"}},
		{"root = [", nil, []string{"line 1"}},
		{"root = 1", nil, []string{"line 1", "integer"}},
		{"[history]\nmaxAge = \"soon\"", nil, []string{"history.maxAge", "soon"}},
		{"[history]\nmaxAge = -5", nil, []string{"negative"}},
		{"[kiln]\nstepTimeout = \"soon\"", nil, []string{"kiln.stepTimeout", "soon"}},
		{"[kiln]\nnoOutputTimeout = -5", nil, []string{"kiln.noOutputTimeout", "negative"}},
		{"", []string{"--build-timeout", "-1s"}, []string{"kiln.buildTimeout", "negative"}},
		{"[kiln]\ncancelGrace = \"later\"", nil, []string{"kiln.cancelGrace", "later"}},
		{"[kiln]\nstepMemory = \"lots\"", nil, []string{"kiln.stepMemory", "lots"}},
		{"", []string{"--step-memory", "1k"}, []string{"kiln.stepMemory", "4MiB"}},
		{"[kiln]\nstepCPUs = -1", nil, []string{"kiln.stepCPUs", "-1"}},
		{"", []string{"--step-cpus", "NaN"}, []string{"kiln.stepCPUs", "NaN"}},
		{"[kiln]\nstepPids = -1", nil, []string{"kiln.stepPids", "negative"}},
		{"[kiln]\nmaxLogStorage = \"some\"", nil, []string{"kiln.maxLogStorage", "some"}},
		{"[kiln]\nmaxLogStorage = \"5%\"", nil, []string{"kiln.maxLogStorage", "5%", "512MB"}},
		{"[history]\nmaxEntries = -5", nil, []string{"maxEntries"}},
		{"insecure-entitlements = [\"root\"]", nil, []string{"root", "network.host"}},
		{"", []string{"--tlscert", "x"}, []string{"--tlskey"}},
		{"", []string{"--tlscacert", "x"}, []string{"--tlscert"}},
		{"", []string{"--oci-worker", "false"}, []string{"--oci-worker"}},
		{"", []string{"--oci-worker-snapshotter", "native"}, []string{"native", "overlayfs"}},
		{"", []string{"--oci-worker-net", "wlan"}, []string{"wlan", "bridge"}},
		{"", []string{"--oci-cni-pool-size", "-1"}, []string{"worker.oci", "-1"}},
		{"[worker.oci]\ncniPoolSize = \"x\"", nil, []string{"line 2"}},
		{"[worker.oci]\nbridgeName = \"a/../b\"", nil, []string{"a/../b"}},
		{"[worker.oci]\nbridgeSubnet = \"10.0.0.1/8\"", nil, []string{"10.0.0.0/8"}},
		{"", []string{"--oci-max-parallelism", "-1"}, []string{"negative"}},
		{"", []string{"--grace", "-1s"}, []string{"negative"}},
	} {
		_, _, err := loaded(t, c.file, c.args...)
		for _, want := range c.want {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%q %q: error %v, want %q", c.file, c.args, err, want)
			}
		}
	}
	cmd := command()
	cmd.Commands = nil
	cmd.Writer, cmd.ErrWriter = io.Discard, io.Discard
	if err := cmd.Run(t.Context(), []string{"kilnd", "--config", "/does/not/exist"}); err == nil || !strings.Contains(err.Error(), "/does/not/exist") {
		t.Errorf("a config that is named and missing: %v", err)
	}
}

// Flags go before the file, and what neither says is no limit.
func TestLimitsOfTime(t *testing.T) {
	cfg, _, err := loaded(t, "[kiln]\nstepTimeout = \"1h\"\nnoOutputTimeout = 90", "--step-timeout", "2h")
	if want := (ops.Limits{Step: 2 * time.Hour, Quiet: 90 * time.Second}); err != nil || cfg.limits != want {
		t.Errorf("%+v, %v, want %+v", cfg.limits, err, want)
	}
}

// What a step gets at most reaches the worker, from flags before the file.
func TestMost(t *testing.T) {
	for _, c := range []struct {
		file string
		args []string
		want executor.Most
	}{
		{"", nil, executor.Most{}},
		{"[kiln]\nstepMemory = \"4g\"\nstepCPUs = 2\nstepPids = 500", nil, executor.Most{Memory: 4 << 30, CPUs: 2, Pids: 500}},
		{"[kiln]\nstepMemory = 1073741824\nstepCPUs = 0.5", []string{"--step-memory", "512MB", "--step-cpus", "1.5", "--step-pids", "9"}, executor.Most{Memory: 512 << 20, CPUs: 1.5, Pids: 9}},
	} {
		cfg, _, err := loaded(t, c.file, c.args...)
		if err != nil {
			t.Fatal(err)
		}
		if got := workerConfig(cfg, slog.New(slog.DiscardHandler)).Most; got != c.want {
			t.Errorf("%q %q: %+v, want %+v", c.file, c.args, got, c.want)
		}
	}
}

// The grace of cancelled steps reaches the worker; none isn't the default one.
func TestCancelGrace(t *testing.T) {
	for text, want := range map[string]time.Duration{"": executor.DefaultGrace, "[kiln]\ncancelGrace = \"3s\"": 3 * time.Second, "[kiln]\ncancelGrace = 0": 1} {
		cfg, _, err := loaded(t, text)
		if err != nil {
			t.Fatal(err)
		}
		if got := workerConfig(cfg, nil).CancelGrace; got != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	}
}

// How steps are confined reaches the worker; flags go before the file.
func TestConfinement(t *testing.T) {
	const file = "[worker.oci]\napparmor-profile = \"docker-default\"\nnoProcessSandbox = true"
	for _, tc := range []struct {
		file    string
		args    []string
		profile string
		machine bool
	}{
		{},
		{file: file, profile: "docker-default", machine: true},
		{file, []string{"--oci-worker-apparmor-profile", "mine", "--oci-worker-no-process-sandbox=false"}, "mine", false},
		{file, []string{"--oci-worker-apparmor-profile="}, "", true},
	} {
		cfg, warnings, err := loaded(t, tc.file, tc.args...)
		must(t, err)
		if got := workerConfig(cfg, slog.Default()); got.AppArmor != tc.profile || got.MachinePIDs != tc.machine || len(warnings) > 0 {
			t.Errorf("%q %q: profile %q, among the machine's processes %v, warnings %q", tc.file, tc.args, got.AppArmor, got.MachinePIDs, warnings)
		}
	}
}

// compat: DMN-048
func TestDurations(t *testing.T) {
	for text, want := range map[string]time.Duration{"3600": time.Hour, `"3600"`: time.Hour, `"1h30m"`: 90 * time.Minute, "0": 0} {
		cfg, _, err := loaded(t, "[history]\nmaxAge = "+text)
		if err != nil || cfg.historyAge != want {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
	}
	if _, err := parseDuration("k", int64(1)<<62); err == nil {
		t.Error("seconds that don't fit in a duration were accepted")
	}
}

func TestWhatHasNoEffectIsWarnedOf(t *testing.T) {
	_, warnings, err := loaded(t, "[worker.oci]\nselinux = true\n[frontend.\"gateway.v0\"]\nenabled = true\n", "--cdi-disabled", "--oci-worker-selinux")
	must(t, err)
	all := strings.Join(warnings, "\n")
	for _, want := range []string{"worker.oci.selinux", "frontend.gateway.v0.enabled", "--cdi-disabled", "--oci-worker-selinux"} {
		if !strings.Contains(all, want) {
			t.Errorf("no warning of %s in %q", want, all)
		}
	}
}

// compat: DMN-047
func TestRegistrySections(t *testing.T) {
	cfg, warnings, err := loaded(t, `
[registry."docker.io"]
mirrors = ["m1", "m2/path"]
[registry."r.io:5000"]
http = true
insecure = false
ca = ["ca.pem"]
tlsconfigdir = ["/certs"]
[[registry."r.io:5000".keypair]]
key = "k"
cert = "c"
`)
	must(t, err)
	hosts := workerConfig(cfg, slog.Default()).Registry.Hosts
	r := hosts["r.io:5000"]
	if len(warnings) > 0 || len(hosts) != 2 || !slices.Equal(hosts["docker.io"].Mirrors, []string{"m1", "m2/path"}) || hosts["docker.io"].PlainHTTP != nil ||
		!*r.PlainHTTP || *r.Insecure || r.RootCAs[0] != "ca.pem" || r.KeyPairs[0].Cert != "c" || r.TLSConfigDirs[0] != "/certs" {
		t.Errorf("hosts %+v, warnings %q", hosts, warnings)
	}
}

func TestIdleWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newIdleWatch(time.Minute)
		idle := func() bool {
			synctest.Wait()
			select {
			case <-w.idle:
				return true
			default:
				return false
			}
		}
		after := func(d time.Duration) { <-time.After(d) }
		w.opened()
		after(2 * time.Minute)
		if idle() {
			t.Error("idle with a connection")
		}
		w.opened()
		w.closed()
		after(2 * time.Minute)
		if idle() {
			t.Error("idle with one of two connections")
		}
		w.closed()
		after(59 * time.Second)
		if idle() {
			t.Error("idle too early")
		}
		after(2 * time.Second)
		if !idle() {
			t.Error("not idle")
		}
		w.opened()
		w.closed()
		w.opened() // within the time
		after(2 * time.Minute)
		if idle() {
			t.Error("idle with a connection that came back")
		}
	})
}

func TestWatchedConnectionsAreCountedOnce(t *testing.T) {
	inner, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	must(t, err)
	w := newIdleWatch(time.Hour)
	l := watched{Listener: inner, watch: w}
	defer l.Close()
	out, err := net.Dial("unix", inner.Addr().String())
	must(t, err)
	defer out.Close()
	in, err := l.Accept()
	must(t, err)
	must(t, in.Close())
	in.Close() // a second time
	if w.conns != 0 {
		t.Errorf("%d connections", w.conns)
	}
}

// compat: DMN-004
func TestUnixSocket(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a", "s")
	cfg := &config{group: fmt.Sprint(os.Getgid())}
	l, err := listenUnix(path, cfg)
	must(t, err)
	st, err := os.Stat(path)
	must(t, err)
	if st.Mode().Perm() != 0o660 {
		t.Errorf("mode %v", st.Mode())
	}
	if _, err := listenUnix(path, cfg); err == nil || !strings.Contains(err.Error(), "another daemon") {
		t.Errorf("a second daemon: %v", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	must(t, l.Close())
	if l, err = listenUnix(path, cfg); err != nil {
		t.Fatalf("a socket that nobody listens on: %v", err)
	}
	must(t, l.Close())

	file := filepath.Join(dir, "precious")
	must(t, os.WriteFile(file, []byte("x"), 0o600))
	if _, err := listenUnix(file, cfg); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("a file in the way: %v", err)
	}
	if data, err := os.ReadFile(file); err != nil || string(data) != "x" {
		t.Errorf("the file is now %q, %v", data, err)
	}
	if _, err := listenUnix(filepath.Join(dir, "t"), &config{group: "no such group"}); err == nil || !strings.Contains(err.Error(), "no such group") {
		t.Errorf("a bad group: %v", err)
	}
	if os.Geteuid() != 0 {
		t.Fatal("giving a socket to a group needs root")
	}
	grouped := filepath.Join(dir, "grouped")
	l, err = listenUnix(grouped, &config{group: "12345"})
	must(t, err)
	defer l.Close()
	st, err = os.Stat(grouped)
	must(t, err)
	if gid := st.Sys().(*syscall.Stat_t).Gid; gid != 12345 {
		t.Errorf("group %d", gid)
	}
	for _, addr := range []string{"", "unix://", "npipe://x", "/run/s"} {
		if _, err := listenOn(addr, cfg, slog.New(slog.DiscardHandler)); err == nil {
			t.Errorf("%q was accepted", addr)
		}
	}
}

// authority signs certificates.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newAuthority(t *testing.T) *authority {
	a := &authority{t: t, dir: t.TempDir(), pool: x509.NewCertPool()}
	a.cert, a.key = a.sign("ca", true)
	a.pool.AddCert(a.cert)
	return a
}

// sign writes NAME.crt and NAME.key.
func (a *authority) sign(name string, ca bool) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(a.t, err)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotAfter: time.Now().Add(time.Hour), IsCA: ca, BasicConstraintsValid: true,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = tmpl, key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, &key.PublicKey, signer)
	must(a.t, err)
	raw, err := x509.MarshalECPrivateKey(key)
	must(a.t, err)
	must(a.t, os.WriteFile(a.path(name+".crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	must(a.t, os.WriteFile(a.path(name+".key"), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: raw}), 0o600))
	cert, err := x509.ParseCertificate(der)
	must(a.t, err)
	return cert, key
}

func (a *authority) path(name string) string { return filepath.Join(a.dir, name) }

// compat: DMN-007
func TestTLSListener(t *testing.T) {
	a := newAuthority(t)
	a.sign("server", false)
	a.sign("client", false)
	cfg := &config{}
	cfg.GRPC.TLS.Cert, cfg.GRPC.TLS.Key, cfg.GRPC.TLS.CA = a.path("server.crt"), a.path("server.key"), a.path("ca.crt")
	l, err := listenOn("tcp://127.0.0.1:0", cfg, slog.New(slog.DiscardHandler))
	must(t, err)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("hello")) // fails where the handshake does
			c.Close()
		}
	}()
	defer l.Close()
	read := func(certs ...tls.Certificate) (string, error) {
		c, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{RootCAs: a.pool, Certificates: certs})
		if err != nil {
			return "", err
		}
		defer c.Close()
		data, err := io.ReadAll(c)
		return string(data), err
	}
	pair, err := tls.LoadX509KeyPair(a.path("client.crt"), a.path("client.key"))
	must(t, err)
	if got, err := read(pair); err != nil || got != "hello" {
		t.Errorf("with a certificate: %q, %v", got, err)
	}
	if got, err := read(); err == nil {
		t.Errorf("without a certificate: %q", got)
	}
	cfg.GRPC.TLS.CA = a.path("server.key")
	if _, err := tlsConfig(cfg); err == nil || !strings.Contains(err.Error(), "no certificate") {
		t.Errorf("a CA that is none: %v", err)
	}
	cfg.GRPC.TLS.Key = a.path("client.key")
	if _, err := tlsConfig(cfg); err == nil || !strings.Contains(err.Error(), "client.key") {
		t.Errorf("a key of another certificate: %v", err)
	}
}

func TestTLSThatIsMissingOrUnusedIsWarnedOf(t *testing.T) {
	var log bytes.Buffer
	l, err := listenOn("tcp://127.0.0.1:0", &config{}, slog.New(slog.NewTextHandler(&log, nil)))
	must(t, err)
	must(t, l.Close())
	if !strings.Contains(log.String(), "TLS is not enabled") {
		t.Errorf("log %q", &log)
	}
	log.Reset()
	cfg := &config{}
	cfg.GRPC.TLS.Cert = "cert"
	l, err = listenOn("unix://"+filepath.Join(t.TempDir(), "s"), cfg, slog.New(slog.NewTextHandler(&log, nil)))
	must(t, err)
	must(t, l.Close())
	if !strings.Contains(log.String(), "not used on unix sockets") {
		t.Errorf("log %q", &log)
	}
}

func TestLogger(t *testing.T) {
	cfg := &config{}
	for _, level := range []string{"", "info", "debug", "trace", "warn", "warning", "error", "fatal", "panic"} {
		cfg.Log.Level, cfg.Log.Format = level, "json"
		if _, err := newLogger(cfg); err != nil {
			t.Error(err)
		}
	}
	cfg.Log.Level = "loud"
	if _, err := newLogger(cfg); err == nil || !strings.Contains(err.Error(), "loud") {
		t.Errorf("error %v", err)
	}
	cfg.Log.Level, cfg.Log.Format = "", "xml"
	if _, err := newLogger(cfg); err == nil || !strings.Contains(err.Error(), "xml") {
		t.Errorf("error %v", err)
	}
}

// compat: DMN-016
// compat: DMN-042
func TestNetworkFlagsAndKeys(t *testing.T) {
	cfg, warnings, err := loaded(t, "")
	must(t, err)
	if n := cfg.network(); n.Mode != network.Auto || n.CNIConfig != "/etc/buildkit/cni.json" || n.CNIBinaries != "/opt/cni/bin" || n.PoolSize != nil || len(warnings) > 0 {
		t.Errorf("defaults %+v, warnings %q", n, warnings)
	}
	const file = `
[worker.oci]
networkMode = "bridge"
cniConfigPath = "/file.conflist"
cniBinaryPath = "/file/bin"
cniPoolSize = 0
bridgeName = "br1"
bridgeSubnet = "192.168.7.0/24"
`
	cfg, warnings, err = loaded(t, file)
	must(t, err)
	n := cfg.network()
	if n.PoolSize == nil || *n.PoolSize != 0 {
		t.Errorf("pool size %v", n.PoolSize)
	}
	n.PoolSize = nil
	if want := (network.Config{Mode: network.Bridge, CNIConfig: "/file.conflist", CNIBinaries: "/file/bin", BridgeName: "br1", BridgeSubnet: "192.168.7.0/24"}); n != want || len(warnings) > 0 {
		t.Errorf("file %+v, warnings %q", n, warnings)
	}
	cfg, _, err = loaded(t, file, "--oci-worker-net", "cni", "--oci-cni-config-path", "/c.json", "--oci-cni-binary-dir", "/b", "--oci-cni-pool-size", "8")
	must(t, err)
	if n = cfg.network(); n.Mode != network.CNI || n.CNIConfig != "/c.json" || n.CNIBinaries != "/b" || n.PoolSize == nil || *n.PoolSize != 8 {
		t.Errorf("flags %+v", n)
	}
}

// compat: DMN-013
func TestRootlessDefaults(t *testing.T) {
	t.Setenv("HOME", "/home/ann")
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/1000")
	t.Setenv("XDG_DATA_HOME", "")
	cfg, warnings, err := loaded(t, "", "--rootless", "--oci-worker-rootless")
	must(t, err)
	if cfg.Root != "/home/ann/.local/share/kiln" || !slices.Equal(cfg.GRPC.Address, []string{"unix:///run/user/1000/buildkit/buildkitd.sock"}) || !cfg.Worker.OCI.Rootless || len(warnings) > 0 {
		t.Errorf("%q %q %q", cfg.Root, cfg.GRPC.Address, warnings)
	}
	cfg, _, err = loaded(t, "root = \"/file\"\n[worker.oci]\nrootless = true\n", "--rootless", "--addr", "tcp://flag")
	must(t, err)
	if cfg.Root != "/file" || !slices.Equal(cfg.GRPC.Address, []string{"tcp://flag"}) || !cfg.Worker.OCI.Rootless {
		t.Errorf("what is said has no effect: %q %q", cfg.Root, cfg.GRPC.Address)
	}
}
