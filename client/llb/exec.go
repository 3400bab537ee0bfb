package llb

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/moby/buildkit/solver/pb"
)

// exec is the vertex of a command.
type exec struct {
	state       State // what it runs on, with the options of Run applied
	mounts      []*mount
	secrets     []secret
	ssh         []sshSocket
	devices     []*pb.CDIDevice
	proxy       *ProxyEnv
	constraints Constraints
}

// ExecState is the root file system after a command, through which its other
// mounts can be reached.
type ExecState struct {
	State
	exec *exec
}

// Run runs a command on s. Options change only this command, not the state
// that follows.
func (s State) Run(opts ...RunOption) ExecState {
	r := runInfo{exec: exec{state: s}}
	for _, o := range opts {
		o.applyRun(&r)
	}
	e := &r.exec
	root := e.addMount(pb.RootMount, s.out, r.rootOpts...)
	for _, add := range r.mounts {
		e.addMount(add.target, add.source, add.opts...)
	}
	return ExecState{State: s.withOutput(root), exec: e}
}

// Root is the root file system after the command.
func (s ExecState) Root() State { return s.State }

// AddMount mounts source at target while the command runs and returns what it
// is afterwards.
func (s ExecState) AddMount(target string, source State, opts ...MountOption) State {
	return source.withOutput(s.exec.addMount(target, source.out, opts...))
}

// GetMount is what is mounted at target after the command; Scratch if nothing
// is.
func (s ExecState) GetMount(target string) State {
	for _, m := range s.exec.mounts {
		if m.target == target {
			return newState(m.output)
		}
	}
	return Scratch()
}

func (e *exec) addMount(target string, source *output, opts ...MountOption) *output {
	m := &mount{target: target, source: source}
	for _, o := range opts {
		o(m)
	}
	e.mounts = append(e.mounts, m)
	if m.readonly {
		m.output = source
	} else {
		m.output = &output{vertex: e, platform: e.constraints.platform, index: func() (int64, error) { return e.outputIndex(m) }}
	}
	return m.output
}

// outputIndex is the place of m among the mounts that are outputs.
func (e *exec) outputIndex(m *mount) (int64, error) {
	var i int64
	for _, other := range e.sorted() {
		if other == m && m.hasOutput() {
			return i, nil
		}
		if other.hasOutput() {
			i++
		}
	}
	return 0, fmt.Errorf("the mount at %s keeps nothing after the command", m.target)
}

// sorted returns the mounts with parents before children.
func (e *exec) sorted() []*mount {
	mounts := slices.Clone(e.mounts)
	slices.SortStableFunc(mounts, func(a, b *mount) int { return cmp.Compare(a.target, b.target) })
	return mounts
}

func (e *exec) marshal(m *marshaller) (*pb.Op, Constraints, error) {
	if len(e.state.args) == 0 {
		return nil, Constraints{}, errors.New("a command needs arguments")
	}
	if e.state.dir == "" {
		return nil, Constraints{}, errors.New("a command needs a working directory")
	}
	c := e.constraints.clone()
	body := &pb.ExecOp{
		Meta:       e.meta(&c),
		Network:    e.state.network,
		Security:   e.state.security,
		CdiDevices: e.devices,
	}
	op := &pb.Op{Op: &pb.Op_Exec{Exec: body}, Platform: m.platform(c.platform, e.state.platform)}
	if err := e.addMounts(m, op, body, &c); err != nil {
		return nil, Constraints{}, err
	}
	e.addSecrets(body, &c)
	e.addSSH(body, &c)
	e.needModes(&c)
	return op, c, nil
}

// meta makes the process of the op.
func (e *exec) meta(c *Constraints) *pb.Meta {
	s := e.state.settings
	// The daemon sets PATH if the environment has none.
	c.need(pb.CapExecMetaBase, pb.CapExecMetaSetsDefaultPath)
	if len(e.ssh) > 0 {
		s.env = s.env.SetDefault("SSH_AUTH_SOCK", e.ssh[0].path(0))
	}
	meta := &pb.Meta{
		Args:                      s.args,
		Env:                       s.env.ToArray(),
		Cwd:                       s.dir,
		User:                      s.user,
		Hostname:                  s.hostname,
		CgroupParent:              s.cgroupParent,
		RemoveMountStubsRecursive: true,
		Ulimit:                    s.ulimits,
	}
	for _, code := range s.exitCodes {
		meta.ValidExitCodes = append(meta.ValidExitCodes, int32(code))
	}
	for _, h := range s.extraHosts {
		meta.ExtraHosts = append(meta.ExtraHosts, &pb.HostIP{Host: h.Host, IP: h.IP.String()})
	}
	if s.exitCodes != nil {
		c.need(pb.CapExecValidExitCode)
	}
	if len(s.ulimits) > 0 {
		c.need(pb.CapExecMetaUlimit)
	}
	if p := e.proxy; p != nil {
		meta.ProxyEnv = &pb.ProxyEnv{
			HttpProxy:  p.HTTPProxy,
			HttpsProxy: p.HTTPSProxy,
			FtpProxy:   p.FTPProxy,
			NoProxy:    p.NoProxy,
			AllProxy:   p.AllProxy,
		}
		c.need(pb.CapExecMetaProxy)
	}
	return meta
}

func (e *exec) needModes(c *Constraints) {
	if e.state.network != NetModeSandbox {
		c.need(pb.CapExecMetaNetwork)
	}
	if e.state.security != SecurityModeSandbox {
		c.need(pb.CapExecMetaSecurity)
	}
	if len(e.devices) > 0 {
		c.need(pb.CapExecMetaCDI)
	}
	if c.meta.resources != nil {
		c.need(pb.CapExecMetaLinuxResources)
	}
}

// addMounts adds the mounts in order; that of the root is among them.
func (e *exec) addMounts(m *marshaller, op *pb.Op, body *pb.ExecOp, c *Constraints) error {
	var outputs int64
	for _, mnt := range e.sorted() {
		pm := mnt.toPB(c)
		if mnt.source != nil && mnt.tmpfs {
			return fmt.Errorf("the tmpfs at %s can't start from another file system", mnt.target)
		}
		var err error
		if pm.Input, err = m.addInput(op, mnt.source); err != nil {
			return err
		}
		pm.Output = int64(pb.SkipOutput)
		if mnt.hasOutput() {
			pm.Output = outputs
			outputs++
		}
		body.Mounts = append(body.Mounts, pm)
	}
	return nil
}

func (e *exec) addSecrets(body *pb.ExecOp, c *Constraints) {
	for _, s := range e.secrets {
		c.need(pb.CapExecMountSecret)
		if s.env != "" {
			c.need(pb.CapExecSecretEnv)
			body.Secretenv = append(body.Secretenv, &pb.SecretEnv{ID: s.id, Name: s.env, Optional: s.optional})
		}
		if s.target != "" {
			body.Mounts = append(body.Mounts, &pb.Mount{
				Input:     int64(pb.Empty),
				Dest:      s.target,
				MountType: pb.MountType_SECRET,
				SecretOpt: &pb.SecretOpt{
					ID:       s.id,
					Uid:      uint32(s.uid),
					Gid:      uint32(s.gid),
					Mode:     uint32(s.mode),
					Optional: s.optional,
				},
			})
		}
	}
}

func (e *exec) addSSH(body *pb.ExecOp, c *Constraints) {
	for i, s := range e.ssh {
		c.need(pb.CapExecMountSSH)
		body.Mounts = append(body.Mounts, &pb.Mount{
			Input:     int64(pb.Empty),
			Dest:      s.path(i),
			MountType: pb.MountType_SSH,
			SSHOpt: &pb.SSHOpt{
				ID:       s.id,
				Uid:      uint32(s.uid),
				Gid:      uint32(s.gid),
				Mode:     uint32(s.mode),
				Optional: s.optional,
			},
		})
	}
}
