package llb

import (
	"fmt"
	"slices"

	"github.com/google/shlex"
	"github.com/moby/buildkit/solver/pb"
)

// RunOption is an option of Run.
type RunOption interface{ applyRun(*runInfo) }

// runInfo collects options. Mounts wait until the platform is known.
type runInfo struct {
	exec
	rootOpts []MountOption
	mounts   []mountInfo
}

type mountInfo struct {
	target string
	source *output
	opts   []MountOption
}

type runOption func(*runInfo)

func (o runOption) applyRun(r *runInfo) { o(r) }

func (o StateOption) applyRun(r *runInfo) { r.state = o(r.state) }

// With applies state options to one command.
func With(opts ...StateOption) RunOption {
	return StateOption(func(s State) State { return s.With(opts...) })
}

// Args is the command.
func Args(args []string) RunOption {
	return StateOption(func(s State) State { s.args = slices.Clone(args); return s })
}

// Shlex is the command, split as a shell would. A string that can't be split,
// such as one with an open quote, is no command; Marshal reports that.
func Shlex(cmd string) RunOption {
	args, err := shlex.Split(cmd)
	if err != nil {
		args = nil
	}
	return Args(args)
}

// Shlexf is Shlex with a format.
func Shlexf(format string, a ...any) RunOption { return Shlex(fmt.Sprintf(format, a...)) }

// ValidExitCodes are those with which the command has succeeded; 0 is none of
// them unless listed.
func ValidExitCodes(codes ...int) RunOption {
	return StateOption(func(s State) State { s.exitCodes = slices.Clone(codes); return s })
}

// AddMount mounts a file system while the command runs.
func AddMount(target string, source State, opts ...MountOption) RunOption {
	return runOption(func(r *runInfo) {
		r.mounts = append(r.mounts, mountInfo{target, source.out, opts})
	})
}

// ReadonlyRootFS lets the command only read the root file system.
func ReadonlyRootFS() RunOption {
	return runOption(func(r *runInfo) { r.rootOpts = append(r.rootOpts, Readonly) })
}

// ProxyEnv are the proxies that a command is told of. They are not part of its
// cache key.
type ProxyEnv struct {
	HTTPProxy, HTTPSProxy, FTPProxy, NoProxy, AllProxy string
}

// WithProxy sets the proxies.
func WithProxy(p ProxyEnv) RunOption { return runOption(func(r *runInfo) { r.proxy = &p }) }

// AddCDIDevice gives the command a device.
func AddCDIDevice(name string, optional bool) RunOption {
	return runOption(func(r *runInfo) {
		r.devices = append(r.devices, &pb.CDIDevice{Name: name, Optional: optional})
	})
}

// secret is a secret of the client, as a file, a variable or both.
type secret struct {
	id             string
	target, env    string
	uid, gid, mode int
	optional       bool
}

// SecretOption changes a secret.
type SecretOption func(*secret)

// AddSecret shows the secret named target as a file at target.
func AddSecret(target string, opts ...SecretOption) RunOption {
	return addSecret(secret{id: target, target: target}, opts)
}

// AddSecretEnv shows the secret named id as the variable name.
func AddSecretEnv(id, name string, opts ...SecretOption) RunOption {
	return addSecret(secret{id: id, env: name}, opts)
}

func addSecret(s secret, opts []SecretOption) RunOption {
	s.mode = 0o400
	for _, o := range opts {
		o(&s)
	}
	return runOption(func(r *runInfo) { r.secrets = append(r.secrets, s) })
}

// SecretID sets the secret's name.
func SecretID(id string) SecretOption { return func(s *secret) { s.id = id } }

// SecretOptional lets the command run without the secret.
func SecretOptional(s *secret) { s.optional = true }

// SecretAsEnvName shows the secret as a variable, too.
func SecretAsEnvName(name string) SecretOption { return func(s *secret) { s.env = name } }

// SecretFileOpt sets the owner and mode of the file; the default is root, 0400.
func SecretFileOpt(uid, gid, mode int) SecretOption {
	return func(s *secret) { s.uid, s.gid, s.mode = uid, gid, mode }
}

// sshSocket is an ssh agent of the client.
type sshSocket struct {
	id, target     string
	uid, gid, mode int
	optional       bool
}

// path is where the i-th socket is found.
func (s sshSocket) path(i int) string {
	if s.target != "" {
		return s.target
	}
	return fmt.Sprintf("/run/buildkit/ssh_agent.%d", i)
}

// SSHOption changes an ssh socket.
type SSHOption func(*sshSocket)

// AddSSHSocket shows an ssh agent of the client, and sets SSH_AUTH_SOCK to the
// first unless it is set.
func AddSSHSocket(opts ...SSHOption) RunOption {
	s := sshSocket{mode: 0o600}
	for _, o := range opts {
		o(&s)
	}
	return runOption(func(r *runInfo) { r.ssh = append(r.ssh, s) })
}

// SSHID sets the agent's id.
func SSHID(id string) SSHOption { return func(s *sshSocket) { s.id = id } }

// SSHOptional lets the command run without the agent.
func SSHOptional(s *sshSocket) { s.optional = true }

// SSHSocketTarget sets the path of the socket.
func SSHSocketTarget(path string) SSHOption { return func(s *sshSocket) { s.target = path } }

// SSHSocketOpt sets path, owner and mode of the socket; the default is root,
// 0600.
func SSHSocketOpt(path string, uid, gid, mode int) SSHOption {
	return func(s *sshSocket) { s.target, s.uid, s.gid, s.mode = path, uid, gid, mode }
}
