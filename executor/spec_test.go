//go:build linux && (amd64 || arm64)

package executor

import (
	"encoding/json"
	"errors"
	"flag"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode"

	"github.com/kilnbuild/kiln/executor/rootfs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

var update = flag.Bool("update", false, "rewrite golden files")

// The spec is all that runtimes know of a process.
func TestSpecGolden(t *testing.T) {
	base := Process{ID: "id", Args: []string{"/bin/sh", "-c", "true"}, Env: []string{"PATH=/bin", "A=1", "A=2"}, Cwd: "/work/../src/"}
	root := rootfs.User{Groups: []uint32{0}, Home: "/root"}
	binds := []specs.Mount{{Destination: "/etc/hosts", Type: "bind", Source: "/files/hosts", Options: []string{"rbind", "nosuid", "noexec", "nodev", "ro"}}}
	for name, tc := range map[string]struct {
		change      func(p *Process)
		user        rootfs.User
		confinement confinement
	}{
		"default": {user: root},
		"user":    {user: rootfs.User{UID: 1000, GID: 1001, Groups: []uint32{1001, 5}, Home: "/home/u"}},
		"cgroup namespace, read-only": {user: root, confinement: confinement{cgroupNS: true}, change: func(p *Process) {
			p.ReadonlyRoot, p.Hostname = true, "box"
		}},
		"insecure":         {user: root, confinement: confinement{appArmor: "kiln-default"}, change: func(p *Process) { p.Security = SecurityInsecure }},
		"AppArmor profile": {user: root, confinement: confinement{appArmor: "kiln-default"}},
		"limits": {user: root, change: func(p *Process) {
			p.Ulimits = []Ulimit{{"nofile", 1, 2}, {"core", -1, -1}}
			p.Resources = &Resources{Memory: 1 << 20, MemorySwap: -1, CPUShares: 2, CPUPeriod: 100000, CPUQuota: 5000, CpusetCpus: "0-1", CpusetMems: "0"}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			p := base
			if tc.change != nil {
				tc.change(&p)
			}
			s, err := makeSpec(p, tc.user, binds, tc.confinement)
			if err != nil {
				t.Fatal(err)
			}
			independent(s)
			got, err := json.MarshalIndent(s, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden(t, name, append(got, '\n'))
		})
	}
}

// independent takes out of s what depends on the machine.
func independent(s *specs.Spec) {
	if s.Linux.Seccomp != nil {
		s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: s.Linux.Seccomp.DefaultAction}
	}
	for i, p := range s.Linux.MaskedPaths {
		if strings.Contains(p, "thermal_throttle") {
			s.Linux.MaskedPaths = s.Linux.MaskedPaths[:i]
			break
		}
	}
	var devices []specs.LinuxDevice
	for _, d := range s.Linux.Devices {
		if !strings.HasPrefix(d.Path, "/dev/loop") || d.Path == "/dev/loop-control" || d.Path == "/dev/loop0" {
			devices = append(devices, d)
		}
	}
	s.Linux.Devices = devices
	if c := s.Process.Capabilities; len(c.Ambient) > 0 {
		all := []string{"all of this process's"}
		*c = specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all, Inheritable: all, Ambient: all}
	}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", strings.Map(func(r rune) rune {
		if unicode.IsLetter(r) {
			return r
		}
		return '-'
	}, name)+".json")
	if *update {
		if err := errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(file, got, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("spec differs from %s (rewrite with -update):\n%s", file, got)
	}
}

func TestResolvConfRules(t *testing.T) {
	const host = "# comment\n; other\nnameserver 127.0.0.53\nnameserver 10.0.0.1\nnameserver ::1\nnameserver nonsense\ndomain old.example\nsearch a.example b.example\noptions ndots:1\noptions edns0\nsortlist 130.155.160.0\nnameserver\n"
	const rest = "search a.example b.example\noptions ndots:1 edns0\nsortlist 130.155.160.0\n"
	const public = "nameserver 8.8.8.8\nnameserver 8.8.4.4\nnameserver 2001:4860:4860::8888\nnameserver 2001:4860:4860::8844\n"
	for _, tc := range []struct {
		name, in string
		host     bool
		dns      *DNS
		want     string
	}{
		{"loopback is replaced", host, false, nil, "nameserver 10.0.0.1\n" + rest},
		{"host keeps loopback", host, true, nil, "nameserver 127.0.0.53\nnameserver 10.0.0.1\nnameserver ::1\n" + rest},
		{"none left", "nameserver 127.0.0.1\n", false, nil, public},
		{"empty host file", "", true, nil, public},
		{"overrides stay as they are", host, false, &DNS{Nameservers: []string{"127.0.0.1"}, SearchDomains: []string{"."}, Options: []string{"x"}}, "nameserver 127.0.0.1\noptions x\nsortlist 130.155.160.0\n"},
		{"search alone", host, false, &DNS{SearchDomains: []string{"z", "."}}, "nameserver 10.0.0.1\nsearch z\noptions ndots:1 edns0\nsortlist 130.155.160.0\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			rc := parseResolvConf(tc.in)
			if err := rc.apply(tc.host, tc.dns); err != nil {
				t.Fatal(err)
			}
			if got := string(rc.format()); got != tc.want {
				t.Errorf("got\n%s\nwant\n%s", got, tc.want)
			}
		})
	}
	rc := parseResolvConf("")
	if err := rc.apply(false, &DNS{Nameservers: []string{"bogus"}}); err == nil || !strings.Contains(err.Error(), "bogus") {
		t.Errorf("error %v", err)
	}
}

func FuzzResolvConf(f *testing.F) {
	f.Add("nameserver 1.2.3.4\nsearch a b\noptions x:1\nfoo bar\n", "", "", "")
	f.Add("", "::1", "a.example", "ndots:2")
	f.Add("", "", " a  b ", "\xc3 ")
	f.Add("", "fe80::1%a b", "", "")
	f.Add("", "80::1%a ", "", "")
	f.Add("nameserver ::1\r\n", "fe80::1%a\nnameserver 6.6.6.6", "a\nnameserver 6.6.6.6", "b\x00")
	f.Fuzz(func(t *testing.T, text, server, search, option string) {
		// What is generated is read back as the same.
		rc := parseResolvConf(text)
		dns := &DNS{}
		for _, o := range []struct {
			value string
			list  *[]string
		}{{server, &dns.Nameservers}, {search, &dns.SearchDomains}, {option, &dns.Options}} {
			if o.value != "" {
				*o.list = []string{o.value}
			}
		}
		if rc.apply(false, dns) != nil {
			rc = parseResolvConf(text)
		}
		out := string(rc.format())
		again := parseResolvConf(out)
		if s := string(again.format()); s != out {
			t.Errorf("%q becomes %q", out, s)
		}
		if !slices.Equal(again.servers, rc.servers) {
			t.Errorf("the servers %v become %v", rc.servers, again.servers)
		}
	})
}

func FuzzHosts(f *testing.F) {
	f.Add("box", "some.host", []byte{1, 2, 3, 4})
	f.Add("", "a\n6.6.6.6 bank.example", []byte("0123456789abcdef"))
	f.Add("x # y", "", []byte{})
	f.Fuzz(func(t *testing.T, hostname, host string, ip []byte) {
		content, err := generateHosts(hostname, []HostIP{{host, ip}})
		if err != nil {
			return
		}
		lines := strings.Split(string(content), "\n")
		if len(lines) != 4 || lines[3] != "" || len(strings.FieldsFunc(lines[0], isSpace)) != 3 {
			t.Fatalf("%q", content)
		}
		if fields := strings.Fields(lines[2]); len(fields) != 2 || !net.ParseIP(fields[0]).Equal(ip) || fields[1] != host || strings.Contains(host, "#") {
			t.Errorf("%q for %q with the address %v", lines[2], host, net.IP(ip))
		}
	})
}

func isSpace(c rune) bool { return c == ' ' || c == '\t' }

func TestResolvConfFollowsTheMachine(t *testing.T) {
	r := resolvConfs{}
	a, err := r.get(true)
	if err != nil {
		t.Fatal(err)
	}
	r.generated[true] = []byte("cached")
	if b, err := r.get(true); err != nil || string(b) != "cached" {
		t.Errorf("%q %v", b, err)
	}
	r.stamps[0].size++ // as if the file had changed
	if b, err := r.get(true); err != nil || string(b) != string(a) {
		t.Errorf("%q %v", b, err)
	}
}

func TestFileStore(t *testing.T) {
	s, err := newFileStore(filepath.Join(t.TempDir(), "files"))
	if err != nil {
		t.Fatal(err)
	}
	first, release, err := s.get([]byte("a"))
	if err != nil {
		t.Fatal(err)
	}
	second, release2, err := s.get([]byte("a"))
	if err != nil || first != second {
		t.Fatalf("%s %s %v", first, second, err)
	}
	if err := errors.Join(release(), release2()); err != nil {
		t.Fatal(err)
	}
	for i := range 2 * unusedFiles { // unused ones are kept for a while, used ones always
		name, release, err := s.get([]byte{byte(i)})
		if err != nil {
			t.Fatal(err)
		}
		if i != 0 {
			if err := release(); err != nil {
				t.Fatal(err)
			}
		} else {
			defer func() {
				if _, err := os.Stat(name); err != nil {
					t.Errorf("a file in use is gone: %v", err)
				}
			}()
		}
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil || len(entries) != unusedFiles+1 {
		t.Errorf("%d files, %v", len(entries), err)
	}
}

// Where the machine asks itself, containers ask those that it asks in turn.
func TestServersBehindLoopback(t *testing.T) {
	const public = "nameserver 8.8.8.8\nnameserver 8.8.4.4\nnameserver 2001:4860:4860::8888\nnameserver 2001:4860:4860::8844\n"
	for name, tc := range map[string]struct{ machine, resolved, want, onHost string }{
		"systemd-resolved":        {"nameserver 127.0.0.53\noptions edns0\n", "nameserver 10.1.2.3\nsearch lan\n", "nameserver 10.1.2.3\nsearch lan\n", "nameserver 127.0.0.53\noptions edns0\n"},
		"its other stub":          {"nameserver 127.0.0.54\n", "nameserver 10.1.2.3\n", "nameserver 10.1.2.3\n", "nameserver 127.0.0.54\n"},
		"both families":           {"nameserver 127.0.0.1\nnameserver ::1\n", "nameserver 10.1.2.3\n", "nameserver 10.1.2.3\n", "nameserver 127.0.0.1\nnameserver ::1\n"},
		"one can be reached":      {"nameserver 127.0.0.53\nnameserver 10.0.0.1\n", "nameserver 10.1.2.3\n", "nameserver 10.0.0.1\n", "nameserver 127.0.0.53\nnameserver 10.0.0.1\n"},
		"nothing is behind":       {"nameserver 127.0.0.53\nsearch lan\n", "", public + "search lan\n", "nameserver 127.0.0.53\nsearch lan\n"},
		"loopback is behind, too": {"nameserver 127.0.0.53\nsearch lan\n", "nameserver 127.0.0.1\n", public + "search lan\n", "nameserver 127.0.0.53\nsearch lan\n"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			machine, resolved := filepath.Join(dir, "machine"), filepath.Join(dir, "resolved")
			if err := os.WriteFile(machine, []byte(tc.machine), 0o644); err != nil {
				t.Fatal(err)
			}
			if tc.resolved != "" {
				if err := os.WriteFile(resolved, []byte(tc.resolved), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			for host, want := range map[bool]string{true: tc.onHost, false: tc.want} {
				if got, err := generateResolvConf(machine, resolved, host, nil); err != nil || string(got) != want {
					t.Errorf("with the machine's network %v: %q, %v, want %q", host, got, err, want)
				}
			}
		})
	}
}
