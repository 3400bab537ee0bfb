package executor

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"unicode"

	"golang.org/x/sys/unix"
)

const (
	hostResolvConf = "/etc/resolv.conf"
	// systemd-resolved's list of the real servers behind its stub.
	resolvedResolvConf = "/run/systemd/resolve/resolv.conf"
)

// publicServers are used when the machine's resolv.conf has none that a
// container could reach.
var publicServers = []string{"8.8.8.8", "8.8.4.4", "2001:4860:4860::8888", "2001:4860:4860::8844"}

// resolvConfs generates resolv.conf files, anew when the machine's change.
type resolvConfs struct {
	dns *DNS

	mu        sync.Mutex // guards the fields below; held while small files are read
	stamps    [2]stamp
	generated map[bool][]byte // by whether the network is the machine's
}

// stamp tells versions of a file apart; zero if there is none.
type stamp struct {
	ino   uint64
	size  int64
	mtime unix.Timespec
}

func stampOf(name string) (stamp, error) {
	var st unix.Stat_t
	switch err := unix.Stat(name, &st); err {
	case nil:
		return stamp{st.Ino, st.Size, st.Mtim}, nil
	case unix.ENOENT, unix.ENOTDIR:
		return stamp{}, nil
	default:
		return stamp{}, fmt.Errorf("stat DNS configuration %s: %w", name, err)
	}
}

func (r *resolvConfs) get(host bool) ([]byte, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var now [2]stamp
	for i, name := range []string{hostResolvConf, resolvedResolvConf} {
		var err error
		if now[i], err = stampOf(name); err != nil {
			return nil, err
		}
	}
	if now != r.stamps {
		r.stamps, r.generated = now, nil
	}
	if content, ok := r.generated[host]; ok {
		return content, nil
	}
	content, err := generateResolvConf(hostResolvConf, resolvedResolvConf, host, r.dns)
	if err != nil {
		return nil, err
	}
	if r.generated == nil {
		r.generated = map[bool][]byte{}
	}
	r.generated[host] = content
	return content, nil
}

// resolvConf is a resolv.conf in parts.
type resolvConf struct {
	servers []netip.Addr
	search  []string
	options []string
	other   []string // lines that are none of these
}

// generateResolvConf makes the file that a container gets. Loopback servers
// are not reachable from it, unless it shares the machine's network: where all
// of the machine's are such, as those of systemd-resolved (127.0.0.53, .54) or of a
// dnsmasq, resolved says what is behind them.
func generateResolvConf(machine, resolved string, host bool, dns *DNS) ([]byte, error) {
	rc, err := loadResolvConf(machine)
	if err != nil {
		return nil, err
	}
	if !host && len(rc.servers) > 0 && !rc.reachable() {
		behind, err := loadResolvConf(resolved)
		if err != nil {
			return nil, err
		}
		if behind.reachable() {
			rc = behind
		}
	}
	if err := rc.apply(host, dns); err != nil {
		return nil, err
	}
	return rc.format(), nil
}

// reachable says whether there is a server that isn't on loopback.
func (rc *resolvConf) reachable() bool {
	return slices.ContainsFunc(rc.servers, func(s netip.Addr) bool { return !s.IsLoopback() })
}

// apply makes rc right for a container.
func (rc *resolvConf) apply(host bool, dns *DNS) error {
	overridden, err := rc.override(dns)
	if err != nil {
		return err
	}
	if !overridden && (!host || len(rc.servers) == 0) {
		rc.replaceLoopback()
	}
	return nil
}

// loadResolvConf reads a file; a missing one is empty.
func loadResolvConf(name string) (resolvConf, error) {
	b, err := os.ReadFile(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return resolvConf{}, fmt.Errorf("read DNS configuration: %w", err)
	}
	return parseResolvConf(string(b)), nil
}

func parseResolvConf(text string) (rc resolvConf) {
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\r\n")
		fields := strings.Fields(line)
		if len(fields) == 0 || line[0] == '#' || line[0] == ';' {
			continue
		}
		args := fields[1:]
		switch fields[0] {
		case "nameserver":
			if len(args) > 0 {
				if addr, err := netip.ParseAddr(args[0]); err == nil {
					rc.servers = append(rc.servers, addr)
				}
			}
		case "domain", "search": // the last one counts
			if len(args) > 0 {
				rc.search = args
			}
		case "options":
			rc.options = append(rc.options, args...)
		default:
			rc.other = append(rc.other, line)
		}
	}
	return rc
}

// override applies the daemon's configuration and says whether it has servers.
func (rc *resolvConf) override(dns *DNS) (servers bool, err error) {
	if dns == nil {
		return false, nil
	}
	for _, s := range slices.Concat(dns.Nameservers, dns.SearchDomains, dns.Options) {
		if strings.ContainsFunc(s, unicode.IsControl) {
			return false, fmt.Errorf("DNS setting %q: it must be on one line", s)
		}
	}
	if len(dns.Nameservers) > 0 {
		rc.servers = nil
		for _, s := range dns.Nameservers {
			addr, err := netip.ParseAddr(s)
			if err != nil {
				return false, fmt.Errorf("bad nameserver address: %w", err)
			}
			if strings.ContainsFunc(s, unicode.IsSpace) { // a zone may have any characters
				return false, fmt.Errorf("bad nameserver address %q: it has spaces", s)
			}
			rc.servers = append(rc.servers, addr)
		}
	}
	if len(dns.SearchDomains) > 0 {
		rc.search = nil
		for _, d := range words(dns.SearchDomains) {
			if d != "." { // the root alone means no search
				rc.search = append(rc.search, d)
			}
		}
	}
	if len(dns.Options) > 0 {
		rc.options = words(dns.Options)
	}
	return len(dns.Nameservers) > 0, nil
}

// words takes apart settings that hold several.
func words(list []string) []string { return strings.Fields(strings.Join(list, " ")) }

func (rc *resolvConf) replaceLoopback() {
	var reachable []netip.Addr
	for _, s := range rc.servers {
		if !s.IsLoopback() {
			reachable = append(reachable, s)
		}
	}
	if len(reachable) == 0 {
		for _, s := range publicServers {
			reachable = append(reachable, netip.MustParseAddr(s))
		}
	}
	rc.servers = reachable
}

func (rc *resolvConf) format() []byte {
	var b bytes.Buffer
	for _, s := range rc.servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	if len(rc.search) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(rc.search, " "))
	}
	if len(rc.options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(rc.options, " "))
	}
	for _, line := range rc.other {
		fmt.Fprintln(&b, line)
	}
	return b.Bytes()
}
