//go:build linux

package network

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"

	"github.com/kilnbuild/kiln/internal/cleanup"
	"github.com/kilnbuild/kiln/internal/rootless"
)

// Mode is a kind of network.
type Mode string

// Modes.
const (
	Auto   Mode = "auto" // CNI if its config file is there, else Host
	Host   Mode = "host" // the machine's, also if no mode is given
	None   Mode = "none"
	Bridge Mode = "bridge"
	CNI    Mode = "cni"
)

// Modes lists them all.
func Modes() []Mode { return []Mode{Auto, Host, None, Bridge, CNI} }

// Config says what network processes get that ask for no particular one. Zero
// values stand for what buildkitd has as default.
type Config struct {
	Mode        Mode
	CNIConfig   string // file, a list of plugins if it ends in .conflist
	CNIBinaries string // directory
	PoolSize    *int   // namespaces made ahead; nil: as many as seems useful
	Few         bool   // hardly any processes will run: at most one is made ahead
	// Dir is where executors keep what they know of their networks. Those with
	// the same one share a bridge. "" is one of the executor's own.
	Dir          string
	BridgeName   string
	BridgeSubnet string // an IPv4 prefix, an IPv6 one, or both with a comma between them
}

// What stands for zero values in a Config.
const (
	DefaultCNIConfig    = "/etc/buildkit/cni.json"
	DefaultCNIBinaries  = "/opt/cni/bin"
	defaultBridgeName   = "buildkit0"
	defaultBridgeSubnet = "10.10.0.0/16"
	maxPoolSize         = 1000
)

func setDefault[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

// User is the process that a namespace is for.
type User struct {
	// Hostname is what its user calls it, "" if nothing: networks with a name
	// service may tell others.
	Hostname string
	// Asks says that other processes may have to run before this one ends, as with
	// frontends: nobody waits for it to give back its namespace.
	Asks bool
}

// Provider hands out namespaces of one kind. It is safe for concurrent use.
type Provider interface {
	// Take returns a namespace for a process. If there is no room for another one,
	// it waits until a process that has one ends, or ctx does.
	Take(ctx context.Context, u User) (*Namespace, error)

	// Close removes all that was made for namespaces. None may be in use.
	Close() error
}

// Networks are the networks that one executor's processes can have.
type Networks struct {
	// Default is what a process gets that asks for none in particular; nil is
	// the machine's own.
	Default Provider
	// None has loopback only.
	None Provider
}

// Open prepares the networks, and removes what executors with the same directory
// have left of which none lives. The directory is made if needed.
func Open(dir string, cfg Config, log *slog.Logger) (_ *Networks, err error) {
	if cfg, err = cfg.Resolve(log); err != nil {
		return nil, err
	}
	n := &Networks{}
	var undo cleanup.Stack
	defer func() { err = errors.Join(err, undo.Run()) }()
	n.None = openNone(cfg, log)
	undo.Add(n.None.Close)
	switch cfg.Mode {
	case Host:
		err = sweep(dir, cfg, log)
	case None:
		n.Default = n.None
		err = sweep(dir, cfg, log)
	case Bridge:
		n.Default, err = openBridge(dir, cfg, log)
	case CNI:
		n.Default, err = openCNI(dir, cfg, log)
	}
	if err != nil {
		return nil, fmt.Errorf("set up %s network: %w", cfg.Mode, err)
	}
	undo.Keep()
	return n, nil
}

// Close removes what was made. No namespace may be in use.
func (n *Networks) Close() error {
	err := n.None.Close()
	if n.Default != nil && n.Default != n.None {
		err = errors.Join(err, n.Default.Close())
	}
	return err
}

// Check refuses values that can't be meant.
func (cfg Config) Check() error {
	switch cfg.Mode {
	case "", Auto, Host, None, Bridge, CNI:
	default:
		return fmt.Errorf("network mode %q: must be one of %v", cfg.Mode, Modes())
	}
	if n := cfg.PoolSize; n != nil && (*n < 0 || *n > maxPoolSize) {
		return fmt.Errorf("size of the pool of network namespaces is %d: must be from 0 to %d", *n, maxPoolSize)
	}
	if cfg.BridgeName != "" {
		if err := checkLinkName(cfg.BridgeName); err != nil {
			return fmt.Errorf("bridge name %q: %w", cfg.BridgeName, err)
		}
	}
	if cfg.BridgeSubnet != "" {
		if _, err := parseSubnets(cfg.BridgeSubnet); err != nil {
			return fmt.Errorf("bridge subnet: %w", err)
		}
	}
	return nil
}

// Resolve checks cfg, fills in what is missing, and decides what Auto means, as
// buildkitd does. What it returns resolves to itself.
func (cfg Config) Resolve(log *slog.Logger) (Config, error) {
	setDefault(&cfg.Mode, Host)
	setDefault(&cfg.CNIConfig, DefaultCNIConfig)
	setDefault(&cfg.CNIBinaries, DefaultCNIBinaries)
	setDefault(&cfg.BridgeName, defaultBridgeName)
	setDefault(&cfg.BridgeSubnet, defaultBridgeSubnet)
	if err := cfg.Check(); err != nil {
		return cfg, err
	}
	owned := rootless.OwnsNetwork()
	switch {
	case cfg.Mode == Auto && !owned:
		cfg.Mode = Host
		return cfg, nil
	case (cfg.Mode == Bridge || cfg.Mode == CNI) && !owned:
		return cfg, fmt.Errorf("network mode %s: a rootless daemon can't change the machine's network; use the mode host or none, or give the daemon a network of its own: rootlesskit --net=slirp4netns --copy-up=/etc kilnd", cfg.Mode)
	case cfg.Mode != Auto:
		return cfg, nil
	}
	_, err := os.Stat(cfg.CNIConfig)
	switch {
	case isTrue(os.Getenv("BUILDKIT_NETWORK_BRIDGE_AUTO")):
		cfg.Mode = Bridge
	case err == nil:
		cfg.Mode = CNI
	case errors.Is(err, fs.ErrNotExist):
		log.Warn("steps use the machine's network: no network mode is set, and there is no CNI config file", "file", cfg.CNIConfig)
		cfg.Mode = Host
	default:
		return cfg, fmt.Errorf("look for a CNI config file: %w", err)
	}
	return cfg, nil
}

// ahead is how many namespaces of the default network are made ahead: as many as
// there are likely to be steps that begin at the same moment, before it is known
// how many there are. Plugins are other people's programs, and take much longer
// than the kernel.
func (cfg Config) ahead() int {
	n := min(max(4*runtime.NumCPU(), 8), 32)
	if cfg.Mode == CNI {
		n /= 2
	}
	if cfg.PoolSize != nil {
		n = *cfg.PoolSize
	}
	if cfg.Few {
		n = min(n, 1)
	}
	return n
}

// makers is how many namespaces are made at once for steps that wait. With more of
// them the last one is ready no sooner, for the kernel makes one after the other,
// and the first ones later.
func makers() int { return max(runtime.NumCPU(), 2) }

// owner stands for a state directory in the names of what is made in the
// machine's network: the directory is an executor's alone, so that they are, too.
type owner [4]byte

func ownerOf(dir string) (o owner, err error) {
	dir, err = filepath.Abs(dir)
	if err != nil {
		return o, err
	}
	sum := sha256.Sum256([]byte(dir))
	copy(o[:], sum[:])
	return o, nil
}

func (o owner) String() string { return hex.EncodeToString(o[:]) }

// group is that of the owner's links, by which they are found whatever their
// names are. It is far from the numbers that people choose.
func (o owner) group() uint32 { return binary.BigEndian.Uint32(o[:])&0x3fffffff | 0x40000000 }

// goingGroup is that of links that are about to be removed together.
func (o owner) goingGroup() uint32 { return o.group() + 0x40000000 }

// hardwareAddr is that of the owner's bridge.
func (o owner) hardwareAddr() net.HardwareAddr {
	return append(net.HardwareAddr{0x0a, 0x4b}, o[:]...) // locally administered
}
