//go:build linux

package network

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/kilnbuild/kiln/internal/thread"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inside says that this process has a network and mounts of its own, where the
// tests may do what they like; those of the machine are never touched.
const inside = "KILN_TEST_OWN_NETWORK"

func TestMain(m *testing.M) {
	switch {
	case os.Getenv("CNI_COMMAND") != "":
		os.Exit(fakePlugin())
	case os.Getenv(inside) == "":
		os.Exit(runInside())
	}
	if err := loopbackUp(); err != nil {
		fmt.Fprintln(os.Stderr, "set loopback up:", err)
		os.Exit(1)
	}
	if dir := os.Getenv(holdDir); dir != "" {
		hold(dir)
	}
	os.Exit(m.Run())
}

func runInside() int {
	cmd := exec.Command(os.Args[0], os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	// Else each run of a fake plugin waits for a second at its end, with -race.
	cmd.Env = append(os.Environ(), inside+"=1", "GORACE=atexit_sleep_ms=0")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	runtime.LockOSThread() // the child ends with this thread
	if err := cmd.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "these tests need root, to run in a network of their own:", err)
		return 1
	}
	return 0
}

var discard = slog.New(slog.DiscardHandler)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// open opens networks that are closed, and looked for, when the test ends.
func open(t testing.TB, dir string, cfg Config) *Networks {
	t.Helper()
	before := machine(t)
	n, err := Open(dir, cfg, discard)
	must(t, err)
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		if after := machine(t); after != before {
			t.Errorf("left behind:\n%s\nbefore:\n%s", after, before)
		}
	})
	return n
}

// machine lists links, addresses, neighbors, rules and mounted namespaces.
func machine(t testing.TB) string {
	t.Helper()
	var out bytes.Buffer
	links, err := netlink.LinkList()
	must(t, err)
	for _, l := range links {
		fmt.Fprintln(&out, "link", l.Attrs().Name)
	}
	addrs, err := netlink.AddrList(nil, netlink.FAMILY_V4)
	must(t, err)
	for _, a := range addrs {
		fmt.Fprintln(&out, "address", a.IPNet)
	}
	c, err := nftables.New()
	must(t, err)
	tables, err := c.ListTables()
	must(t, err)
	for _, t := range tables {
		fmt.Fprintln(&out, "table", t.Name)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	for line := range bytes.Lines(mounts) {
		if bytes.Contains(line, []byte(" nsfs ")) {
			out.Write(line)
		}
	}
	return out.String()
}

func take(t testing.TB, p Provider) *Namespace {
	t.Helper()
	n, err := p.Take(t.Context(), User{})
	must(t, err)
	return n
}

// in runs fn in a namespace.
func in(t testing.TB, n *Namespace, fn func()) {
	t.Helper()
	var err error
	thread.Run(func() {
		if err = unix.Setns(n.FD(), unix.CLONE_NEWNET); err == nil {
			fn()
		}
	})
	must(t, err)
}

// clean waits until the kernel has freed the sockets that were closed in n. A pool
// waits a moment only, and makes a new namespace then.
func clean(t testing.TB, n *Namespace) {
	t.Helper()
	limit := time.After(answerWait)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !n.empty() {
		select {
		case <-limit:
			t.Fatal("closed sockets are still there")
		case <-tick.C:
		}
	}
}

// inode tells namespaces apart that there are at the same time.
func inode(t testing.TB, fd int) uint64 {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Fstat(fd, &st))
	return st.Ino
}

// identity is the inode of a namespace that no other gets as long as the test runs:
// without it, one that is made when this one has gone may.
func identity(t testing.TB, n *Namespace) uint64 {
	t.Helper()
	fd, err := unix.FcntlInt(uintptr(n.FD()), unix.F_DUPFD_CLOEXEC, 0)
	must(t, err)
	t.Cleanup(func() { must(t, unix.Close(fd)) })
	return inode(t, fd)
}

// address is what a namespace has on eth0.
func address(t testing.TB, n *Namespace, family int) net.IP {
	t.Helper()
	var ip net.IP
	in(t, n, func() {
		link, err := netlink.LinkByName(innerName)
		if err != nil {
			t.Error(err)
			return
		}
		addrs, err := netlink.AddrList(link, family)
		if err != nil || len(addrs) == 0 {
			t.Errorf("addresses %v, %v", addrs, err)
			return
		}
		ip = addrs[0].IP
	})
	return ip
}

// serve answers each connection to addr, made in n or, if it is nil, in the
// machine, with its name and the address of the other end.
func serve(t testing.TB, n *Namespace, addr, name string) {
	t.Helper()
	var l net.Listener
	var err error
	listen := func() { l, err = net.Listen("tcp", addr) }
	if n == nil {
		listen()
	} else {
		in(t, n, listen)
	}
	must(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
			fmt.Fprintf(c, "%s to %s", name, host)
			c.Close()
		}
	}()
}

const (
	// answerWait bounds a wait for what does come.
	answerWait = 20 * time.Second
	// silence is how long nothing must come from where nothing may.
	silence = 300 * time.Millisecond
)

// ask connects from n, or from the machine, and returns what it is told.
func ask(t testing.TB, n *Namespace, addr string, wait time.Duration) (text string, err error) {
	t.Helper()
	do := func() {
		var c net.Conn
		if c, err = net.DialTimeout("tcp", addr, wait); err != nil {
			return
		}
		defer c.Close()
		var data []byte
		data, err = io.ReadAll(c)
		text = string(data)
	}
	if n == nil {
		do()
	} else {
		in(t, n, do)
	}
	return text, err
}

func answers(t testing.TB, n *Namespace, addr, want string) {
	t.Helper()
	if got, err := ask(t, n, addr, answerWait); err != nil || got != want {
		t.Errorf("%s answers %q, %v; want %q", addr, got, err, want)
	}
}

func silent(t testing.TB, n *Namespace, addr string) {
	t.Helper()
	if got, err := ask(t, n, addr, silence); err == nil {
		t.Errorf("%s answers %q, and must not be reachable", addr, got)
	}
}

// outside is a network behind the machine, which knows no way to a bridge.
func outside(t testing.TB) *Namespace {
	t.Helper()
	n, err := create(func(*Namespace) error { return nil })
	must(t, err)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "wan0"
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "lan0", PeerNamespace: netlink.NsFd(n.FD())}))
	t.Cleanup(func() {
		link, err := netlink.LinkByName("wan0")
		must(t, err)
		must(t, errors.Join(netlink.LinkDel(link), n.close()))
	})
	configure(t, "wan0", "192.0.2.1/24", "2001:db8::1/64")
	in(t, n, func() { configure(t, "lan0", "192.0.2.2/24", "2001:db8::2/64") })
	return n
}

func configure(t testing.TB, name string, addrs ...string) {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err != nil {
		t.Error(err)
		return
	}
	for _, text := range addrs {
		a, err := netlink.ParseAddr(text)
		if err == nil {
			if a.IP.To4() == nil {
				a.Flags = unix.IFA_F_NODAD
			}
			err = netlink.AddrAdd(link, a)
		}
		if err != nil {
			t.Error(err)
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		t.Error(err)
	}
}
