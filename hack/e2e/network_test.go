//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/kilnbuild/kiln/hack/harness"
	"github.com/vishvananda/netlink"
	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"
)

// netNS is a network namespace in which a test may do what it likes. It is open
// as long as the test runs, and nowhere mounted.
type netNS struct {
	t  *testing.T
	fd int
}

func newNetNS(t *testing.T) *netNS {
	t.Helper()
	n := &netNS{t: t, fd: -1}
	leaveThread(t, func() error { return unix.Unshare(unix.CLONE_NEWNET) }, func() {
		var err error
		if n.fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			t.Fatal(err)
		}
		n.up("lo")
	})
	t.Cleanup(func() { unix.Close(n.fd) })
	return n
}

// in runs fn in the namespace; processes that it starts are there, too.
func (n *netNS) in(fn func()) {
	n.t.Helper()
	leaveThread(n.t, func() error { return unix.Setns(n.fd, unix.CLONE_NEWNET) }, fn)
}

// leaveThread runs fn on a thread that leave takes to another namespace. If fn
// ends the test, the thread ends with it.
func leaveThread(t *testing.T, leave func() error, fn func()) {
	t.Helper()
	runtime.LockOSThread()
	own, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(own)
	if err := leave(); err != nil {
		t.Fatalf("network of its own: %v", err)
	}
	fn()
	if err := unix.Setns(own, unix.CLONE_NEWNET); err != nil {
		t.Fatal(err)
	}
	runtime.UnlockOSThread()
}

// up sets a link up with addresses. It is called in the namespace.
func (n *netNS) up(name string, addrs ...string) {
	n.t.Helper()
	link, err := netlink.LinkByName(name)
	for _, text := range addrs {
		var a *netlink.Addr
		if a, err = netlink.ParseAddr(text); err == nil {
			err = netlink.AddrAdd(link, a)
		}
		if err != nil {
			n.t.Fatal(err)
		}
	}
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

// content lists links, addresses and nftables' tables.
func (n *netNS) content() (list []string) {
	n.t.Helper()
	n.in(func() {
		links, err := netlink.LinkList()
		addrs, aerr := netlink.AddrList(nil, netlink.FAMILY_V4)
		c, cerr := nftables.New()
		if err := errors.Join(err, aerr, cerr); err != nil {
			n.t.Fatal(err)
		}
		tables, err := c.ListTables()
		if err != nil {
			n.t.Fatal(err)
		}
		for _, l := range links {
			list = append(list, "link "+l.Attrs().Name)
		}
		for _, a := range addrs {
			list = append(list, "address "+a.IPNet.String())
		}
		for _, t := range tables {
			list = append(list, "table "+t.Name)
		}
	})
	slices.Sort(list)
	return list
}

// machines makes a namespace that stands for the machine, at 192.0.2.1, and one
// for the world, at 192.0.2.2, which knows no way to networks inside the machine.
func machines(t *testing.T) (machine, world *netNS) {
	t.Helper()
	machine, world = newNetNS(t), newNetNS(t)
	machine.in(func() {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "wan0"
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "lan0", PeerNamespace: netlink.NsFd(world.fd)}); err != nil {
			t.Fatal(err)
		}
		machine.up("wan0", "192.0.2.1/24")
	})
	world.in(func() { world.up("lan0", "192.0.2.2/24") })
	return machine, world
}

// serve answers HTTP requests to 192.0.2.2 with the address of who asks, and DNS
// requests of any name with 192.0.2.2.
func (n *netNS) serve() {
	n.t.Helper()
	var l net.Listener
	var dns net.PacketConn
	n.in(func() {
		var err, derr error
		l, err = net.Listen("tcp", "192.0.2.2:80")
		dns, derr = net.ListenPacket("udp", "192.0.2.2:53")
		if err := errors.Join(err, derr); err != nil {
			n.t.Fatal(err)
		}
	})
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, _, _ := net.SplitHostPort(r.RemoteAddr)
		io.WriteString(w, "hello "+host+"\n") //nolint:errcheck // the step misses it
	})}
	go srv.Serve(l) //nolint:errcheck // it is closed
	go resolve(dns)
	n.t.Cleanup(func() { srv.Close(); dns.Close() })
}

func resolve(c net.PacketConn) {
	buf := make([]byte, 1500)
	for {
		k, from, err := c.ReadFrom(buf)
		if err != nil {
			return // closed
		}
		var m dnsmessage.Message
		if m.Unpack(buf[:k]) != nil || len(m.Questions) != 1 {
			continue
		}
		q := m.Questions[0]
		m.Response, m.Additionals = true, nil
		if q.Type == dnsmessage.TypeA {
			m.Answers = []dnsmessage.Resource{{
				Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 1}, Body: &dnsmessage.AResource{A: [4]byte{192, 0, 2, 2}},
			}}
		}
		if answer, err := m.Pack(); err == nil {
			c.WriteTo(answer, from) //nolint:errcheck // the step misses it
		}
	}
}

// fromLayout are the flags with which BASE, that is in a registry which the
// machine of a test doesn't reach, comes from the client.
func fromLayout() []string {
	return []string{"--oci-layout", "store=" + env.layout.Dir, "--opt", "context:base=oci-layout://store@" + string(env.layout.Manifest.Digest)}
}

// newBridged starts a daemon in the network of machine, where nothing of it must
// be left when the test ends.
func newBridged(t *testing.T, machine *netNS, config string, args ...string) *daemon {
	t.Helper()
	before := machine.content()
	t.Cleanup(func() {
		if after := machine.content(); !slices.Equal(after, before) {
			t.Errorf("left behind in the network:\n%q\nbefore:\n%q", after, before)
		}
	})
	var d *daemon
	machine.in(func() { d = newDaemonWithConfig(t, config, append(args, "--oci-worker-net", "bridge")...) })
	return d
}

// compat: LLB-028, LLB-033, DMN-070, DMN-075, DMN-076
func TestBridgeNetwork(t *testing.T) {
	machine, world := machines(t)
	world.serve()
	d := newBridged(t, machine, "[dns]\nnameservers = [\"192.0.2.2\"]\n", "--allow-insecure-entitlement", "network.host", "--allow-insecure-entitlement", "security.insecure")
	if out := d.buildctl("debug", "workers", "-v").must(t).stdout; !regexp.MustCompile(`worker\.network:\s+cni\n`).MatchString(out) {
		t.Errorf("the worker's labels lack its network:\n%s", out)
	}
	out := d.local(strings.Join([]string{
		"FROM base AS b",
		"WORKDIR /out",
		"RUN wget -q -O address http://192.0.2.2/ && wget -q -O name http://some.name.example/",
		"RUN --network=none ls /sys/class/net > none",
		"RUN --network=host ls /sys/class/net > host",
		"RUN --security=insecure wget -q -O insecure http://192.0.2.2/",
		"FROM scratch",
		"COPY --from=b /out /",
	}, "\n"), nil, append(fromLayout(), "--allow", "network.host", "--allow", "security.insecure")...)
	for name, want := range map[string]string{
		"address": "hello 192.0.2.1\n", "name": "hello 192.0.2.1\n", "insecure": "hello 192.0.2.1\n", "none": "lo\n",
	} {
		if got := readFile(t, out, name); got != want {
			t.Errorf("%s = %q, want %q", name, got, want)
		}
	}
	if host := readFile(t, out, "host"); !strings.Contains(host, "buildkit0\n") || !strings.Contains(host, "wan0\n") {
		t.Errorf("in the host's network there are %q", host)
	}
}

// Many at once, each with an address of its own.
func TestBridgeNetworkInParallel(t *testing.T) {
	const stages = 24
	machine, world := machines(t)
	world.serve()
	d := newBridged(t, machine, "")
	var df, copies strings.Builder
	for i := range stages {
		fmt.Fprintf(&df, "FROM base AS s%d\nRUN wget -q -O /%d http://192.0.2.2/ && ip addr show eth0 | grep -o 'inet [0-9.]*' >> /%[1]d\n", i, i)
		fmt.Fprintf(&copies, "COPY --from=s%d /%d /\n", i, i)
	}
	out := d.local(df.String()+"FROM scratch\n"+copies.String(), nil, fromLayout()...)
	for i := range stages {
		if got := readFile(t, out, fmt.Sprint(i)); !strings.HasPrefix(got, "hello 192.0.2.1\ninet 10.10.") {
			t.Errorf("step %d: %q", i, got)
		}
	}
}

// A daemon that is killed while a step runs leaves a bridge. The next one
// removes it, even if it makes none itself.
func TestBridgeNetworkAfterACrash(t *testing.T) {
	machine, world := machines(t)
	world.serve()
	before := machine.content()
	d := newBridged(t, machine, "", "--unclaimed-step-timeout", "0")
	ctx := files{"Dockerfile": "FROM base\nRUN wget -q -O /f http://192.0.2.2/ && echo run''ning && sleep 600\n"}.write(t)
	cmd := d.client(filepath.Join(env.peer, "buildctl"), append([]string{"build", "--frontend", "dockerfile.v0", "--local", "context=" + ctx, "--local", "dockerfile=" + ctx}, fromLayout()...)...)
	output := &lockedBuffer{}
	cmd.Stdout, cmd.Stderr = output, output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := harness.WaitFor(harness.Patience, func() error {
		if !strings.Contains(output.String(), "running") {
			return fmt.Errorf("the step doesn't run:\n%s", output)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	d.kill()
	cmd.Wait() //nolint:errcheck // its daemon is gone
	if left := machine.content(); slices.Equal(left, before) {
		t.Fatal("the crash left nothing: this test is blind")
	}
	bridge := len(d.args) - 1
	d.args[bridge] = "host"
	machine.in(d.start)
	if left := machine.content(); !slices.Equal(left, before) {
		t.Errorf("left behind after a start:\n%q\nbefore:\n%q", left, before)
	}
	d.stop()
	d.args[bridge] = "bridge"
	machine.in(d.start)
	out := d.local("FROM base AS b\nRUN wget -q -O /f http://192.0.2.2/\nFROM scratch\nCOPY --from=b /f /\n", nil, fromLayout()...)
	if got := readFile(t, out, "f"); got != "hello 192.0.2.1\n" {
		t.Errorf("after the crash a step reads %q", got)
	}
}

// A step that outlives its daemon keeps its network, and the next daemon makes no
// other.
func TestBridgeOutlivesDaemon(t *testing.T) {
	machine, world := machines(t)
	world.serve()
	d := newBridged(t, machine, "")
	const reaches = "wget -q -O /reached http://192.0.2.2/ && cp /c/begun /result"
	build := func() *long {
		t.Helper()
		return d.buildLongOf(strings.ReplaceAll(longRun, "cp /c/begun /result", reaches), "base", fromLayout()...)
	}
	first := build()
	first.begun()
	d.kill()
	first.fails()
	machine.in(d.start)
	out := d.local("FROM base AS b\nRUN wget -q -O /f http://192.0.2.2/\nFROM scratch\nCOPY --from=b /f /\n", nil, fromLayout()...)
	if got := readFile(t, out, "f"); got != "hello 192.0.2.1\n" {
		t.Errorf("beside a step of an earlier daemon another reads %q", got)
	}
	second := build()
	second.begun()
	d.goOn()
	second.succeeds(1)
}

// What can't be set up is an error at the start, which says what to change.
func TestBadNetworks(t *testing.T) {
	machine, _ := machines(t)
	before := machine.content()
	for _, c := range []struct {
		args []string
		toml string
		want []string
	}{
		{[]string{"--oci-worker-net", "wlan"}, "", []string{"wlan", "bridge"}},
		{[]string{"--oci-worker-net", "bridge"}, "[worker.oci]\nbridgeName = \"../../x\"\n", []string{"../../x"}},
		{[]string{"--oci-worker-net", "bridge"}, "[worker.oci]\nbridgeName = \"wan0\"\n", []string{"wan0", "bridgeName"}},
		{[]string{"--oci-worker-net", "bridge"}, "[worker.oci]\nbridgeSubnet = \"192.0.2.0/24\"\n", []string{"192.0.2.1", "bridgeSubnet"}},
		{[]string{"--oci-worker-net", "cni", "--oci-cni-config-path", "/no/such"}, "", []string{"/no/such"}},
	} {
		dir := files{"c.toml": c.toml}.write(t)
		var r result
		machine.in(func() {
			r = runCommand(t, kilndCommand(append([]string{"--root", dir + "/state", "--addr", "unix://" + dir + "/s", "--config", dir + "/c.toml"}, c.args...)...))
		})
		r.fails(t, c.want...)
		if after := machine.content(); !slices.Equal(after, before) {
			t.Errorf("%q: left behind:\n%q\nbefore:\n%q", c.args, after, before)
		}
	}
	if _, err := os.Stat("/sys/class/net/buildkit0"); err == nil {
		t.Error("the machine's own network was changed")
	}
}
