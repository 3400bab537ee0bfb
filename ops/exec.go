package ops

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/kilnbuild/kiln/solver"
	gatewaypb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
)

// execOp runs a command in its inputs' filesystems.
type execOp struct {
	vertex
	slots
	loader    *Loader
	op        *pb.ExecOp
	resources *pb.LinuxResources // nil is no limit; no part of the key (LLB-011)
	limits    Limits
}

var (
	_ solver.Limiter = (*execOp)(nil)
	_ solver.Sharer  = (*execOp)(nil)
)

// newExecOp refuses devices of the machine, as upstream's daemon does with CDI
// disabled: the one that a step needs is named, optional ones are left out.
//
// compat: LLB-031, LLB-C49 no: devices of CDI specs aren't given to steps
func (l *Loader) newExecOp(v vertex, op *pb.ExecOp, resources *pb.LinuxResources, limits Limits) (*execOp, error) {
	for i, d := range op.CdiDevices {
		if !d.Optional {
			return nil, unsupported(fmt.Sprintf("exec.cdiDevices[%d]", i),
				"CDI device %q is required by step %q, but CDI device support is disabled", d.Name, v.name)
		}
	}
	if len(op.CdiDevices) > 0 {
		// Optional devices that can't be had are left out, of the key too.
		op = op.CloneVT()
		op.CdiDevices = nil
	}
	return &execOp{vertex: v, slots: l.slots, loader: l, op: op, resources: resources, limits: limits}, nil
}

// Exec prepares the step's mounts, runs its process and commits what it wrote.
func (e *execOp) Exec(ctx context.Context, asker solver.Asker, inputs []solver.Result) ([]solver.Result, error) {
	in, err := refs(inputs)
	if err != nil {
		return nil, err
	}
	identity, err := e.identity(asker)
	if err != nil {
		return nil, err
	}
	if e.ignoreCache && !e.loader.interrupted.has(identity) { // which has done so when it began
		if err := e.pruneCacheMounts(ctx, asker); err != nil {
			return nil, err
		}
	}
	var out []solver.Result
	var left *solver.Remains
	err = e.loader.cfg.Cache.WithRoom(ctx, func() (err error) {
		left.Release() // of the first attempt
		out, left, err = e.once(ctx, asker, identity, in)
		return err
	})
	if err != nil && left != nil {
		left.Err = err
		return nil, left
	}
	return out, err
}

// once is an execution. If its process fails, what is left of it is returned
// with the error.
func (e *execOp) once(ctx context.Context, asker solver.Asker, identity string, in []*cache.Ref) (_ []solver.Result, left *solver.Remains, err error) {
	s := e.newStep(sessionGroup(asker), in)
	s.identity = identity
	defer func() { err = errors.Join(err, s.close(ctx)) }()

	ran, err := s.resumeOrRun(ctx)
	defer s.safe()
	if err != nil {
		if !ran || ctx.Err() != nil {
			return nil, nil, err
		}
		left, lerr := s.remains(ctx)
		return nil, left, errors.Join(err, lerr)
	}
	out, err := s.commit(ctx)
	return out, nil, err
}

// resumeOrRun goes on with what an earlier daemon has begun, or prepares and runs
// the process. It reports whether a process has run.
func (s *step) resumeOrRun(ctx context.Context) (ran bool, err error) {
	if resumed, err := s.resume(ctx); resumed || err != nil {
		return resumed, err
	}
	if s.identity != "" {
		s.loader.cfg.Supervisor.Expect() // the mounts may have to be fetched first
	}
	if err := s.prepare(ctx); err != nil {
		return false, err
	}
	env, err := s.environment(ctx)
	if err != nil {
		return false, err
	}
	return true, s.run(ctx, env)
}

// run runs the prepared process.
func (s *step) run(ctx context.Context, env []string) error {
	view := newLogView(progress.From(ctx), s.loader.logs, time.Now())
	defer view.close() //nolint:errcheck // it was read only
	p := s.process(s.op.Meta, env)
	p.Network, p.Security = netMode(s.op.Network), securityMode(s.op.Security)
	p.Resources = resources(s.resources)
	p.Timeout, p.QuietTimeout = s.limits.Step, s.limits.Quiet
	p.Ulimits = withoutCores(p.Ulimits, s.op.Mounts, s.op.Secretenv)
	if err := s.execute(ctx, p, view.follow); err != nil {
		view.flush()
		return s.failure(ctx, err)
	}
	return nil
}

// process is a process on the set's mounts, as meta describes it.
func (s *mountSet) process(meta *pb.Meta, env []string) executor.Process {
	p := executor.Process{
		ID:                        rand.Text(),
		Root:                      s.root,
		ReadonlyRoot:              s.readonlyRoot,
		Mounts:                    s.mounts,
		Args:                      slices.Concat(s.emulator, meta.Args),
		Env:                       env,
		Cwd:                       path.Join("/", meta.Cwd),
		User:                      meta.User,
		Hostname:                  meta.Hostname,
		CgroupParent:              meta.CgroupParent,
		RemoveMountStubsRecursive: meta.RemoveMountStubsRecursive,
	}
	for _, h := range meta.ExtraHosts {
		p.ExtraHosts = append(p.ExtraHosts, executor.HostIP{Host: h.Host, IP: net.ParseIP(h.IP)})
	}
	for _, u := range meta.Ulimit {
		p.Ulimits = append(p.Ulimits, executor.Ulimit{Name: u.Name, Soft: u.Soft, Hard: u.Hard})
	}
	for _, code := range meta.ValidExitCodes {
		p.ValidExitCodes = append(p.ValidExitCodes, int(code))
	}
	return p
}

// failure is the step's error for what Run returned, with the exit code for
// clients that look for it (CTL-087).
func (s *step) failure(ctx context.Context, err error) error {
	err = withExitCode(err)
	if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
		err = fmt.Errorf("%w: %w", err, cause)
	} else if cause == nil {
		err = s.loader.cfg.Cache.SuspectDisk(ctx, err)
	}
	return fmt.Errorf("process %q did not complete successfully: %w", strings.Join(s.op.Meta.Args, " "), err)
}

func withExitCode(err error) error {
	var exit *executor.ExitError
	if errors.As(err, &exit) {
		return &gatewaypb.ExitError{ExitCode: uint32(exit.Code), Err: err}
	}
	return err
}

func netMode(m pb.NetMode) executor.NetMode {
	switch m {
	case pb.NetMode_HOST:
		return executor.NetHost
	case pb.NetMode_NONE:
		return executor.NetNone
	}
	return executor.NetSandbox
}

func securityMode(m pb.SecurityMode) executor.SecurityMode {
	if m == pb.SecurityMode_INSECURE {
		return executor.SecurityInsecure
	}
	return executor.SecuritySandbox
}

func resources(r *pb.LinuxResources) *executor.Resources {
	if r == nil {
		return nil
	}
	return &executor.Resources{
		Memory:     r.Memory,
		MemorySwap: r.MemorySwap,
		CPUShares:  r.CpuShares,
		CPUPeriod:  r.CpuPeriod,
		CPUQuota:   r.CpuQuota,
		CpusetCpus: r.CpusetCpus,
		CpusetMems: r.CpusetMems,
	}
}
