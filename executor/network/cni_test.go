//go:build linux

package network

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/internal/thread"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// fakePlugin is this test binary, run as the CNI plugin "fake". It gives the
// namespace a link, and notes each call in a file.
func fakePlugin() int {
	var conf struct {
		CNIVersion string `json:"cniVersion"`
		Log        string `json:"log"`
		Fail       bool   `json:"fail"`
	}
	if err := json.NewDecoder(os.Stdin).Decode(&conf); err != nil {
		return 2
	}
	env := os.Getenv
	log, err := os.OpenFile(conf.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return 2
	}
	defer log.Close()
	fmt.Fprintf(log, "%s id=%s netns=%s if=%s args=%s\n", env("CNI_COMMAND"), env("CNI_CONTAINERID"), env("CNI_NETNS"), env("CNI_IFNAME"), env("CNI_ARGS"))
	if conf.Fail && env("CNI_COMMAND") == "ADD" {
		fmt.Printf(`{"cniVersion":%q,"code":100,"msg":"no cable"}`, conf.CNIVersion)
		return 1
	}
	if env("CNI_COMMAND") == "ADD" {
		thread.Run(func() { err = addDummy(env("CNI_NETNS"), env("CNI_IFNAME")) })
		if err != nil {
			fmt.Printf(`{"cniVersion":%q,"code":101,"msg":%q}`, conf.CNIVersion, err)
			return 1
		}
		fmt.Printf(`{"cniVersion":%q,"interfaces":[{"name":"eth0"}],"ips":[]}`, conf.CNIVersion)
	}
	return 0
}

func addDummy(path, name string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs})
}

// cniConfig writes a config of the fake plugin, and returns what it notes.
func cniConfig(t *testing.T, name string, fail bool) (cfg Config, calls func() []string) {
	t.Helper()
	dir := t.TempDir()
	bin := filepath.Join(dir, "bin")
	must(t, os.Mkdir(bin, 0o700))
	self, err := os.Executable()
	must(t, err)
	must(t, os.Symlink(self, filepath.Join(bin, "fake")))
	log := filepath.Join(dir, "log")
	plugin := fmt.Sprintf(`{"cniVersion":"1.0.0","name":"n","type":"fake","log":%q,"fail":%v}`, log, fail)
	if strings.HasSuffix(name, "list") {
		plugin = fmt.Sprintf(`{"cniVersion":"1.0.0","name":"n","plugins":[%s]}`, plugin)
	}
	must(t, os.WriteFile(filepath.Join(dir, name), []byte(plugin), 0o600))
	zero := 0
	return Config{Mode: CNI, CNIConfig: filepath.Join(dir, name), CNIBinaries: bin, PoolSize: &zero}, func() []string {
		data, err := os.ReadFile(log)
		must(t, err)
		return strings.Split(strings.TrimSpace(string(data)), "\n")
	}
}

// field is a field of what the plugin notes.
func field(line, name string) string {
	_, rest, _ := strings.Cut(line, name+"=")
	value, _, _ := strings.Cut(rest, " ")
	return value
}

func TestCNI(t *testing.T) {
	for _, name := range []string{"net.json", "net.conflist"} {
		t.Run(name, func(t *testing.T) {
			cfg, calls := cniConfig(t, name, false)
			before := machine(t)
			dir := t.TempDir()
			n, err := Open(dir, cfg, discard)
			must(t, err)
			pool := n.Default.(*plugins).pool
			idle(t, pool)
			ns := take(t, n.Default)
			in(t, ns, func() {
				if _, err := netlink.LinkByName("eth0"); err != nil {
					t.Errorf("the namespace isn't connected: %v", err)
				}
			})
			byPath, err := os.Open(ns.Path())
			must(t, err)
			if inode(t, int(byPath.Fd())) != inode(t, ns.FD()) {
				t.Error("the path leads to another namespace")
			}
			must(t, byPath.Close())
			clean(t, ns)
			ns.Release()
			idle(t, pool)
			again := take(t, n.Default)
			if again != ns {
				t.Error("a clean namespace was not used again")
			}
			again.Discard()
			// A process with a name has a namespace of its own.
			named, err := n.Default.Take(t.Context(), User{Hostname: "my.host"})
			must(t, err)
			named.Release()
			hostile, err := n.Default.Take(t.Context(), User{Hostname: "x;CNI_BAD=1"})
			must(t, err)
			hostile.Release()
			must(t, n.Close())
			got := calls()
			adds := slices.DeleteFunc(slices.Clone(got), func(s string) bool { return !strings.HasPrefix(s, "ADD ") })
			if len(got) != 2*len(adds) || len(adds) != 3 {
				t.Fatalf("not each ADD has its DEL, or there aren't 3:\n%s", strings.Join(got, "\n"))
			}
			if args := field(adds[1], "args"); !strings.Contains(args, "K8S_POD_NAME=my.host") {
				t.Errorf("the plugin isn't told of the name: %s", args)
			}
			if strings.Contains(strings.Join(got, "\n"), "CNI_BAD") {
				t.Error("a host name became an argument")
			}
			if after := machine(t); after != before {
				t.Errorf("left behind:\n%s", after)
			}
			if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
				t.Errorf("files left behind: %v %v", left, err)
			}
		})
	}
}

func TestCNIErrors(t *testing.T) {
	failing, calls := cniConfig(t, "net.json", true)
	list, _ := cniConfig(t, "net.conflist", false)
	data, err := os.ReadFile(list.CNIConfig)
	must(t, err)
	list.CNIConfig += ".json"
	must(t, os.WriteFile(list.CNIConfig, data, 0o600))
	good, _ := cniConfig(t, "net.json", false)
	for name, c := range map[string]struct {
		cfg  Config
		want []string
	}{
		"plugin fails":    {failing, []string{"no cable"}},
		"list not called": {list, []string{list.CNIConfig, ".conflist"}},
		"no config":       {Config{Mode: CNI, CNIConfig: "/no/such", CNIBinaries: good.CNIBinaries}, []string{"/no/such", "--oci-cni-config-path"}},
		"no directory":    {Config{Mode: CNI, CNIConfig: good.CNIConfig, CNIBinaries: "/no/such"}, []string{"/no/such", "--oci-cni-binary-dir"}},
		"no plugin":       {Config{Mode: CNI, CNIConfig: good.CNIConfig, CNIBinaries: t.TempDir()}, []string{"fake"}},
	} {
		t.Run(name, func(t *testing.T) {
			before := machine(t)
			_, err := Open(t.TempDir(), c.cfg, discard)
			for _, want := range c.want {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("error %v lacks %q", err, want)
				}
			}
			if after := machine(t); after != before {
				t.Errorf("left behind:\n%s", after)
			}
		})
	}
	if got := calls(); len(got) != 2 || !strings.HasPrefix(got[1], "DEL") {
		t.Errorf("a plugin that failed isn't told to undo what it did: %s", got)
	}
}

// compat: DMN-061
// compat: DMN-075
func TestAuto(t *testing.T) {
	cfg, _ := cniConfig(t, "net.json", false)
	cfg.Mode = Auto
	is := func(cfg Config, want Mode) {
		t.Helper()
		got, err := cfg.Resolve(discard)
		must(t, err)
		if got.Mode != want {
			t.Errorf("the mode is %s, not %s", got.Mode, want)
		}
		if n := open(t, t.TempDir(), cfg); (n.Default == nil) != (want == Host) {
			t.Errorf("%s: a provider of namespaces: %v", want, n.Default)
		}
	}
	is(cfg, CNI)
	is(Config{Mode: Auto, CNIConfig: filepath.Join(t.TempDir(), "none.json")}, Host)
	is(Config{}, Host)
	t.Setenv("BUILDKIT_NETWORK_BRIDGE_AUTO", "true")
	is(cfg, Bridge)
}

// compat: DMN-062
func TestInitLock(t *testing.T) {
	name := filepath.Join(t.TempDir(), "lock")
	t.Setenv("BUILDKIT_CNI_INIT_LOCK_PATH", name)
	unlock, err := lockInit()
	must(t, err)
	cfg, calls := cniConfig(t, "net.json", false)
	opened := make(chan *Networks)
	go func() {
		n, err := Open(t.TempDir(), cfg, discard)
		if err != nil {
			t.Error(err)
		}
		opened <- n
	}()
	f, err := os.Open(name)
	must(t, err)
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != unix.EWOULDBLOCK {
		t.Errorf("the lock isn't held: %v", err)
	}
	if _, err := os.Stat(filepath.Join(filepath.Dir(cfg.CNIConfig), "log")); err == nil {
		t.Errorf("plugins ran without the lock: %s", calls())
	}
	unlock()
	n := <-opened
	if n != nil {
		must(t, n.Close())
	}
}
