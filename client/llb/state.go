package llb

import (
	"encoding/json"
	"fmt"
	"net"
	"path"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	"github.com/moby/buildkit/solver/pb"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// State is a file system, as the output of an operation, and the settings with
// which commands run on it. It is a value: every method that changes something
// returns a new State. The zero State is Scratch without a working directory.
type State struct {
	out *output // nil is scratch
	settings
}

// settings are what Run takes from the state it runs on. Slices are never
// written to once set.
type settings struct {
	env          EnvList
	dir          string
	user         string
	hostname     string
	cgroupParent string
	args         []string
	extraHosts   []HostIP
	ulimits      []*pb.Ulimit
	exitCodes    []int
	network      pb.NetMode
	security     pb.SecurityMode
	platform     *ocispec.Platform
}

// HostIP is a line of /etc/hosts.
type HostIP struct {
	Host string
	IP   net.IP
}

// StateOption changes a State; State.With applies it and Run accepts it.
type StateOption func(State) State

// Network and security modes.
const (
	NetModeSandbox = pb.NetMode_UNSET
	NetModeHost    = pb.NetMode_HOST
	NetModeNone    = pb.NetMode_NONE

	SecurityModeSandbox  = pb.SecurityMode_SANDBOX
	SecurityModeInsecure = pb.SecurityMode_INSECURE
)

// Scratch is the empty file system.
func Scratch() State { return newState(nil) }

func newState(o *output) State {
	return State{}.withOutput(o).Dir("/")
}

// withOutput returns s with another file system but the same settings.
func (s State) withOutput(o *output) State {
	s.out = o
	if o != nil && o.platform != nil {
		s = s.Platform(*o.platform)
	}
	return s
}

// IsScratch reports whether s is the empty file system.
func (s State) IsScratch() bool { return s.out == nil }

// WithOutput returns the file system of other with the settings of s.
func (s State) WithOutput(other State) State { return s.withOutput(other.out) }

// Reset returns the file system of s with the settings of other.
func (s State) Reset(other State) State { return other.withOutput(s.out) }

// With applies options in order.
func (s State) With(opts ...StateOption) State {
	for _, o := range opts {
		s = o(s)
	}
	return s
}

// AddEnv sets an environment variable.
func (s State) AddEnv(key, value string) State {
	s.env = s.env.AddOrReplace(key, value)
	return s
}

// AddEnvf is AddEnv with a format.
func (s State) AddEnvf(key, format string, a ...any) State {
	return s.AddEnv(key, fmt.Sprintf(format, a...))
}

// Dir sets the working directory; a relative one is joined to the present one.
func (s State) Dir(dir string) State {
	if !path.IsAbs(dir) {
		base := s.dir
		if base == "" {
			base = "/"
		}
		dir = path.Join(base, dir)
	}
	s.dir = dir
	return s
}

// Dirf is Dir with a format.
func (s State) Dirf(format string, a ...any) State { return s.Dir(fmt.Sprintf(format, a...)) }

// User sets the user and, after a colon, the group of commands.
func (s State) User(user string) State { s.user = user; return s }

// Hostname sets the host name that commands see.
func (s State) Hostname(name string) State { s.hostname = name; return s }

// Platform sets the platform of the operations on s that name none.
func (s State) Platform(p ocispec.Platform) State {
	p = platforms.Normalize(p)
	s.platform = &p
	return s
}

// Network sets the network of commands.
func (s State) Network(mode pb.NetMode) State { s.network = mode; return s }

// Security sets the security mode of commands.
func (s State) Security(mode pb.SecurityMode) State { s.security = mode; return s }

// AddExtraHost adds a line to /etc/hosts of commands.
func (s State) AddExtraHost(host string, ip net.IP) State {
	s.extraHosts = append(slices.Clip(s.extraHosts), HostIP{host, ip})
	return s
}

// UlimitName names a resource limit, such as "nofile".
type UlimitName string

// AddUlimit sets a resource limit of commands.
func (s State) AddUlimit(name UlimitName, soft, hard int64) State {
	s.ulimits = append(slices.Clip(s.ulimits), &pb.Ulimit{Name: string(name), Soft: soft, Hard: hard})
	return s
}

// WithCgroupParent sets the cgroup under which commands run.
func (s State) WithCgroupParent(parent string) State { s.cgroupParent = parent; return s }

// Env returns the environment.
func (s State) Env() EnvList { return s.env }

// GetEnv returns the value of one environment variable.
func (s State) GetEnv(key string) (string, bool) { return s.env.Get(key) }

// GetDir returns the working directory.
func (s State) GetDir() string { return s.dir }

// GetArgs returns the arguments of commands.
func (s State) GetArgs() []string { return slices.Clone(s.args) }

// GetPlatform returns the platform set on s, or nil.
func (s State) GetPlatform() *ocispec.Platform {
	if s.platform == nil {
		return nil
	}
	p := *s.platform
	return &p
}

// WithImageConfig takes environment, working directory and platform from the
// JSON of an image config.
func (s State) WithImageConfig(config []byte) (State, error) {
	var img ocispec.Image
	if err := json.Unmarshal(config, &img); err != nil {
		return State{}, fmt.Errorf("parse image config: %w", err)
	}
	for _, kv := range img.Config.Env {
		if k, v, _ := strings.Cut(kv, "="); k != "" {
			s = s.AddEnv(k, v)
		}
	}
	s = s.Dir(img.Config.WorkingDir)
	if img.Architecture != "" && img.OS != "" {
		s = s.Platform(img.Platform)
	}
	return s, nil
}

// The same settings as options.

// AddEnv is State.AddEnv as an option.
func AddEnv(key, value string) StateOption {
	return func(s State) State { return s.AddEnv(key, value) }
}

// Dir is State.Dir as an option.
func Dir(dir string) StateOption { return func(s State) State { return s.Dir(dir) } }

// User is State.User as an option.
func User(user string) StateOption { return func(s State) State { return s.User(user) } }

// Hostname is State.Hostname as an option.
func Hostname(name string) StateOption { return func(s State) State { return s.Hostname(name) } }

// Network is State.Network as an option.
func Network(mode pb.NetMode) StateOption { return func(s State) State { return s.Network(mode) } }

// Security is State.Security as an option.
func Security(mode pb.SecurityMode) StateOption {
	return func(s State) State { return s.Security(mode) }
}

// AddExtraHost is State.AddExtraHost as an option.
func AddExtraHost(host string, ip net.IP) StateOption {
	return func(s State) State { return s.AddExtraHost(host, ip) }
}

// AddUlimit is State.AddUlimit as an option.
func AddUlimit(name UlimitName, soft, hard int64) StateOption {
	return func(s State) State { return s.AddUlimit(name, soft, hard) }
}

// WithCgroupParent is State.WithCgroupParent as an option.
func WithCgroupParent(parent string) StateOption {
	return func(s State) State { return s.WithCgroupParent(parent) }
}
