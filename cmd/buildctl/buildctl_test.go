package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kilnbuild/kiln/client"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"github.com/urfave/cli/v3"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// parsed runs read on the flags that args give to `build`.
func parsed[T any](t *testing.T, read func(*cli.Command) (T, error), args ...string) (out T, err error) {
	t.Helper()
	cmd := buildCommand()
	cmd.Flags = append(cmd.Flags, connectionFlags()...)
	cmd.Action = func(_ context.Context, c *cli.Command) (err error) {
		out, err = read(c)
		return err
	}
	cmd.ErrWriter, cmd.Writer = &bytes.Buffer{}, &bytes.Buffer{}
	err = cmd.Run(t.Context(), append([]string{"build"}, args...))
	return out, err
}

// compat: BCL-020, BCL-023, BCL-024, BCL-026, BCL-033
func TestLongForm(t *testing.T) {
	dir := t.TempDir()
	opts, err := parsed(t, solveOptions, "--frontend", "f", "--opt", "a=b,c=d", "--opt", "e=", "--local", "ctx="+dir, "--oci-layout", "l="+dir,
		"--allow", "network.host", "--no-cache", "-o", `type=image,"name=a,b",push=true`, "--output", "type=local,dest=out")
	must(t, err)
	if opts.Frontend != "f" || opts.Attrs["a"] != "b,c=d" || opts.Attrs["e"] != "" || opts.Locals["ctx"] != dir || opts.OCILayouts["l"] != dir {
		t.Errorf("options %+v", opts)
	}
	if _, ok := opts.Attrs["no-cache"]; !ok || !slices.Equal(opts.Entitlements, []string{"network.host"}) {
		t.Errorf("options %+v", opts)
	}
	if len(opts.Exports) != 2 || opts.Exports[0].Attrs["name"] != "a,b" || opts.Exports[0].Attrs["push"] != "true" || opts.Exports[1].OutputDir != "out" {
		t.Errorf("exports %+v", opts.Exports)
	}
	for want, args := range map[string][]string{
		`--opt "a"`:       {"--frontend", "f", "--opt", "a"},
		`--local "x"`:     {"--frontend", "f", "--local", "x"},
		"needs type=":     {"--frontend", "f", "-o", "name=x"},
		"output":          {"--frontend", "f", "-o", `"`},
		"--tag goes with": {"--frontend", "f", "-t", "x"},
		"you meant dest":  {"--frontend", "f", "-o", "type=tar,output=x"},
		"one PATH":        {dir, dir},
		"build context":   {filepath.Join(dir, "nope")},
		"--push needs":    {"--push", dir},
		"--build-context": {"--build-context", "x", dir},
		"-f is relative":  {"-f", "nope", dir},
	} {
		if _, err := parsed(t, solveOptions, args...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", args, err, want)
		}
	}
}

func TestShortForm(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Mkdir(filepath.Join(dir, "sub"), 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "sub", "D"), []byte("FROM scratch\n"), 0o644))
	t.Setenv("SET", "value")
	opts, err := parsed(t, solveOptions, "-t", "a", "-t", "b:1", "--push", "-f", filepath.Join(dir, "sub", "D"), "--build-arg", "X=1,2", "--build-arg", "SET", "--build-arg", "KILN_UNSET",
		"--label", "l=m", "--target", "t", "--platform", "linux/amd64,linux/arm64", "--build-context", "n="+dir, "--build-context", "i=docker-image://x", dir)
	must(t, err)
	want := map[string]string{
		"filename": "D", "build-arg:X": "1,2", "build-arg:SET": "value", "label:l": "m", "target": "t", "platform": "linux/amd64,linux/arm64",
		"context:n": "local:n", "context:i": "docker-image://x",
	}
	for k, v := range want {
		if opts.Attrs[k] != v {
			t.Errorf("%s is %q, want %q", k, opts.Attrs[k], v)
		}
	}
	if len(opts.Attrs) != len(want) || opts.Frontend != "dockerfile.v0" || opts.Locals["dockerfile"] != filepath.Join(dir, "sub") || opts.Locals["context"] != dir || opts.Locals["n"] != dir {
		t.Errorf("options %+v", opts)
	}
	if ex := opts.Exports; len(ex) != 1 || ex[0].Type != "image" || ex[0].Attrs["name"] != "a,b:1" || ex[0].Attrs["push"] != "true" {
		t.Errorf("exports %+v", ex)
	}
	opts, err = parsed(t, solveOptions, "-t", "a", "-o", "out", "-o", "type=oci,dest=x", "-o", "type=docker,name=own", dir)
	must(t, err)
	if ex := opts.Exports; len(ex) != 3 || ex[0].OutputDir != "out" || ex[1].Attrs["name"] != "a" || ex[2].Attrs["name"] != "own" {
		t.Errorf("exports %+v", ex)
	}
}

// compat: BCL-031
func TestSecrets(t *testing.T) {
	file := filepath.Join(t.TempDir(), "s")
	must(t, os.WriteFile(file, []byte("x"), 0o600))
	t.Setenv("MY_SECRET", "x")
	for _, spec := range []string{"id=a,src=" + file, "id=a,source=" + file, "id=a,env=MY_SECRET", "id=a,type=env,src=MY_SECRET", "ID=a,type=file,src=" + file, "id=MY_SECRET"} {
		if _, err := secretProvider([]string{spec}); err != nil {
			t.Errorf("%s: %v", spec, err)
		}
	}
	for _, spec := range []string{"", "id", "id=a,src=/does/not/exist", "id=a,type=x", "id=a,nope=x", `"`, "src=" + file} {
		if _, err := secretProvider([]string{spec}); err == nil || !strings.Contains(err.Error(), "--secret") {
			t.Errorf("%s: error %v", spec, err)
		}
	}
}

// compat: BCL-032
func TestSSH(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "sock")
	l := listenUnix(t, socket)
	defer l.Close()
	t.Setenv("SSH_AUTH_SOCK", socket)
	for _, spec := range []string{"default", "default=" + socket, "x=" + socket + ",raw=true", "x=raw=true," + socket} {
		if _, err := sshProvider([]string{spec}); err != nil {
			t.Errorf("%s: %v", spec, err)
		}
	}
	for _, spec := range []string{"x=/does/not/exist", "x=" + socket + ",raw=maybe", "x=raw=true", "x=" + socket + "," + socket + ",raw=1"} {
		if _, err := sshProvider([]string{spec}); err == nil || !strings.Contains(err.Error(), "--ssh") {
			t.Errorf("%s: error %v", spec, err)
		}
	}
}

// compat: BCL-038
func TestRegistryTLS(t *testing.T) {
	got, err := registryTLS([]string{"host=a,ca=c1", "host=a,cert=c,key=k,insecure=true", "host=b,ca=c2"})
	must(t, err)
	if a := got["a"]; len(got) != 2 || !slices.Equal(a.RootCAs, []string{"c1"}) || len(a.KeyPairs) != 1 || !a.Insecure || got["b"].Insecure {
		t.Errorf("%+v", got)
	}
	for _, spec := range []string{"ca=x", "host=a,insecure=x", "host=a,bogus=1"} {
		if _, err := registryTLS([]string{spec}); err == nil {
			t.Errorf("%s was accepted", spec)
		}
	}
}

// compat: BCL-002, BCL-003
func TestTLSFlags(t *testing.T) {
	dir := t.TempDir()
	if _, err := parsed(t, tlsConfig, "--tlsdir", dir); err == nil || !strings.Contains(err.Error(), "ca.pem or ca.crt") {
		t.Errorf("an empty --tlsdir: %v", err)
	}
	cert, key := certificate(t)
	for _, name := range []string{"ca.crt", "tls.crt"} {
		must(t, os.WriteFile(filepath.Join(dir, name), cert, 0o600))
	}
	if _, err := parsed(t, tlsConfig, "--tlsdir", dir); err == nil || !strings.Contains(err.Error(), "key.pem or tls.key") {
		t.Errorf("a --tlsdir without a key: %v", err)
	}
	must(t, os.WriteFile(filepath.Join(dir, "tls.key"), key, 0o600))
	conf, err := parsed(t, tlsConfig, "--tlsdir", dir, "--tlsservername", "n")
	must(t, err)
	if conf.ServerName != "n" || len(conf.Certificates) != 1 || conf.RootCAs == nil {
		t.Errorf("config %+v", conf)
	}
	if _, err := parsed(t, tlsConfig, "--tlsdir", dir, "--tlscert", "x"); err == nil || !strings.Contains(err.Error(), "exclude") {
		t.Errorf("both forms: %v", err)
	}
	if _, err := parsed(t, tlsConfig, "--tlscacert", filepath.Join(dir, "tls.key")); err == nil || !strings.Contains(err.Error(), "no certificate") {
		t.Errorf("a CA that is none: %v", err)
	}
	if _, err := parsed(t, tlsConfig, "--tlscert", filepath.Join(dir, "tls.crt")); err == nil {
		t.Error("a certificate without its key was accepted")
	}
	if conf, err := parsed(t, tlsConfig); conf != nil || err != nil {
		t.Errorf("no flags: %v, %v", conf, err)
	}
}

func certificate(t *testing.T) (cert, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &private.PublicKey, private)
	must(t, err)
	raw, err := x509.MarshalECPrivateKey(private)
	must(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: raw})
}

// compat: BCL-027
func TestNoCacheOfDefinitions(t *testing.T) {
	one, two := []byte("one"), []byte("two")
	def := &pb.Definition{Def: [][]byte{one, two}, Metadata: map[string]*pb.OpMetadata{digest.FromBytes(one).String(): {Description: map[string]string{"k": "v"}}}}
	ignoreCache(def)
	for _, op := range def.Def {
		if m := def.Metadata[digest.FromBytes(op).String()]; m == nil || !m.IgnoreCache {
			t.Errorf("op %s: %v", op, m)
		}
	}
	if def.Metadata[digest.FromBytes(one).String()].Description["k"] != "v" {
		t.Error("metadata is lost")
	}
	ignoreCache(&pb.Definition{})
}

// compat: BCL-034
func TestMetadataFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "m")
	desc := base64.StdEncoding.EncodeToString([]byte(`{"size":5}`))
	must(t, writeMetadata(path, client.Response{"plain": "x", "desc": desc, "number": base64.StdEncoding.EncodeToString([]byte("5"))}))
	data, err := os.ReadFile(path)
	must(t, err)
	var got map[string]any
	must(t, json.Unmarshal(data, &got))
	if m, ok := got["desc"].(map[string]any); !ok || m["size"] != 5.0 || got["plain"] != "x" || got["number"] != "NQ==" {
		t.Errorf("metadata %s", data)
	}
}

// compat: BCL-041
func TestPrintedResults(t *testing.T) {
	for want, resp := range map[string]client.Response{
		"text\n":           {"frontend.result.txt": "text\n", "frontend.result.json": "{}"},
		"a: 1\njson: {}\n": {"frontend.result.json": "{}", "frontend.result.a": "1", "other": "x"},
		"":                 {"containerimage.digest": "x"},
	} {
		var out bytes.Buffer
		must(t, printResult(&out, resp))
		if out.String() != want {
			t.Errorf("%v: %q, want %q", resp, &out, want)
		}
	}
}

func TestPrintedErrors(t *testing.T) {
	pos := func(line int32) *pb.Position { return &pb.Position{Line: line} }
	info := &pb.SourceInfo{Filename: "Dockerfile", Data: []byte("FROM x\nRUN y\n")}
	err := errdefs.WithSource(errors.New("no"), &errdefs.Source{Info: info, Ranges: []*pb.Range{{Start: pos(2), End: pos(2)}}})
	err = errdefs.WithSource(err, &errdefs.Source{Info: info, Ranges: []*pb.Range{{Start: pos(1)}}}) // can't be printed
	var out bytes.Buffer
	printError(&out, err, false)
	for _, want := range []string{"Dockerfile:2", ">>> RUN y", "error: no\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q lacks %q", &out, want)
		}
	}
}

func TestPrivateDaemonPlaces(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", "/r")
	t.Setenv("XDG_DATA_HOME", "/d")
	p, err := privateDaemon()
	must(t, err)
	if p.addr() != "unix:///r/kiln/kilnd.sock" || p.state != "/d/kiln" {
		t.Errorf("%+v", p)
	}
}

// The directory that the socket is in must be this user's alone.
func TestPrivateDirectory(t *testing.T) {
	p := private{run: filepath.Join(t.TempDir(), "a", "run")}
	must(t, p.ownRunDir())
	st, err := os.Stat(p.run)
	must(t, err)
	if st.Mode().Perm() != 0o700 {
		t.Errorf("mode %v", st.Mode())
	}
	must(t, p.ownRunDir())
	must(t, os.Chmod(p.run, 0o755))
	if err := p.ownRunDir(); err == nil || !strings.Contains(err.Error(), "0700") {
		t.Errorf("a directory open to others: %v", err)
	}
	must(t, os.Chmod(p.run, 0o700))
	link := private{run: p.run + "-link"}
	must(t, os.Symlink(p.run, link.run))
	if err := link.ownRunDir(); err == nil {
		t.Error("a link was accepted")
	}
}

func TestUnreachableDaemon(t *testing.T) {
	for _, addr := range []string{"unix:///does/not/exist", "tcp://127.0.0.1:1", "nonsense"} {
		if err := reachable(t.Context(), addr, time.Minute, false); err == nil || !strings.Contains(err.Error(), addr) {
			t.Errorf("%s: %v", addr, err)
		}
	}
	socket := filepath.Join(t.TempDir(), "s")
	up := make(chan error, 1)
	go func() { up <- reachable(t.Context(), "unix://"+socket, time.Minute, true) }()
	defer listenUnix(t, socket).Close()
	must(t, <-up)
}
