package build

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"syscall"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/frontend"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/solver"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	fstypes "github.com/tonistiigi/fsutil/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// containers are those of one build, and what of its failed steps containers
// may be made from.
type containers struct {
	br *bridge

	mu     sync.Mutex // guards the fields below, and that making isn't added to once it is over
	left   map[string]ops.Result
	failed *errdefs.Solve // the step that failed last, of those that left something
	made   map[*container]bool
	over   bool
	making sync.WaitGroup
}

func newContainers(br *bridge) *containers {
	return &containers{br: br, left: map[string]ops.Result{}, made: map[*container]bool{}}
}

// remember makes what comes with err available to containers (GW-064). It stays
// the solver's.
func (cs *containers) remember(err error) {
	var left *solver.Remains
	var failed *errdefs.SolveError
	if !errors.As(err, &left) || !errors.As(err, &failed) {
		return
	}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.failed = failed.Solve
	for _, list := range [][]solver.Result{left.Inputs, left.Left} {
		for _, r := range list {
			if id := resultID(r); id != "" {
				cs.left[id] = r.(ops.Result)
			}
		}
	}
}

// Failed is the step that failed last, of those that containers can be made from;
// nil if there is none.
func (b *Build) Failed() *errdefs.Solve {
	cs := b.bridge.containers
	cs.mu.Lock()
	defer cs.mu.Unlock()
	return cs.failed
}

// resultID is what a client calls a result that came with an error; "" is none,
// and an empty one.
func resultID(r solver.Result) string {
	if res, ok := r.(ops.Result); ok && res.Ref != nil {
		return res.ID()
	}
	return ""
}

// NewContainer makes a container for the client.
func (br *bridge) NewContainer(ctx context.Context, req frontend.ContainerRequest) (frontend.Container, error) {
	cs := br.containers
	if err := cs.begin(); err != nil {
		return nil, err
	}
	defer cs.making.Done()
	for losses := 0; ; losses++ {
		c, lost, err := cs.make(ctx, req)
		if err == nil || !lost || losses == maxLosses {
			return c, containerError(err)
		}
	}
}

func (cs *containers) begin() error {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if cs.over {
		return errEnded
	}
	cs.making.Add(1)
	return nil
}

// make reports an input that was lost and will be another one the next time.
func (cs *containers) make(ctx context.Context, req frontend.ContainerRequest) (_ frontend.Container, lost bool, err error) {
	creq := ops.ContainerRequest{
		Name: req.ID, Network: req.Network, Hostname: req.Hostname, ExtraHosts: req.ExtraHosts, Platform: req.Platform,
		Entitlements: cs.br.b.granted, Group: session.NewGroup(cs.br.b.req.Session),
	}
	defer func() {
		for _, in := range creq.Inputs {
			in.Release()
		}
	}()
	for i, m := range req.Mounts {
		if m.Mount == nil {
			return nil, false, invalid("NewContainer: mounts[%d] is missing", i)
		}
		in, err := cs.input(ctx, m)
		if err != nil {
			return nil, false, fmt.Errorf("mount %s of container %s: %w", m.Mount.Dest, req.ID, err)
		}
		mount := m.Mount.CloneVT()
		mount.Input = int64(pb.Empty)
		if in != nil {
			mount.Input = int64(len(creq.Inputs))
			creq.Inputs = append(creq.Inputs, in)
		}
		creq.Mounts = append(creq.Mounts, mount)
	}
	c, err := cs.br.b.engine.cfg.Worker.Loader().NewContainer(ctx, cs.br.b.ctx, creq)
	if errors.Is(err, cache.ErrLost) {
		return nil, cs.loseLost(req, err), err
	}
	if err != nil {
		return nil, false, err
	}
	out := &container{Container: c, owner: cs}
	cs.mu.Lock()
	cs.made[out] = true
	cs.mu.Unlock()
	return out, false, nil
}

// input returns a handle of the caller's on what m shows; nil is nothing.
func (cs *containers) input(ctx context.Context, m frontend.ContainerMount) (*cache.Ref, error) {
	if m.Ref != nil || m.Mount.ResultID == "" {
		return cs.br.solved(ctx, m.Ref)
	}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	res, ok := cs.left[m.Mount.ResultID]
	if !ok {
		return nil, status.Errorf(codes.NotFound, "no result %s: neither a reference that Solve has returned nor one that came with an error of this build", m.Mount.ResultID)
	}
	return res.Ref.Clone(), nil
}

// loseLost gives up what is lost of the refs of req, and reports whether
// anything was.
func (cs *containers) loseLost(req frontend.ContainerRequest, why error) (any bool) {
	for _, m := range req.Mounts {
		if own, ok := m.Ref.(*ref); ok && own.loseIfLost(why) {
			any = true
		}
	}
	return any
}

// release ends all containers, and makes no more.
func (cs *containers) release() error {
	cs.mu.Lock()
	cs.over = true
	cs.mu.Unlock()
	cs.making.Wait()
	cs.mu.Lock()
	made := maps.Clone(cs.made)
	cs.mu.Unlock()
	var errs []error
	for c := range made {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// containerError names the fields of a container's request as they are called
// there.
func containerError(err error) error {
	var de *ops.DefinitionError
	if errors.As(err, &de) {
		return status.Errorf(de.Code, "container: %s: %v", strings.TrimPrefix(de.Field, "exec."), de.Err)
	}
	return err
}

// container is a frontend.Container.
type container struct {
	*ops.Container
	owner *containers
}

func (c *container) Run(ctx context.Context, req frontend.ProcessRequest) error {
	p := ops.ContainerProcess{
		Meta: req.Meta, SecretEnv: req.SecretEnv, Security: req.Security, Terminal: req.Terminal,
		Stdin: req.Stdin, Stdout: req.Stdout, Stderr: req.Stderr,
	}
	if req.Started != nil {
		p.Started = func(r executor.Running) { req.Started(process{r}) }
	}
	return containerError(c.Container.Run(ctx, p))
}

func (c *container) Release() error {
	c.owner.mu.Lock()
	delete(c.owner.made, c)
	c.owner.mu.Unlock()
	return c.Close()
}

func (c *container) ReadFile(_ context.Context, mount int, name string, r *gwpb.FileRange) (data []byte, err error) {
	err = c.look(mount, func(t tree) (err error) { data, err = t.readFile(name, r); return err })
	return data, err
}

func (c *container) ReadDir(_ context.Context, mount int, name, include string) (list []*fstypes.Stat, err error) {
	err = c.look(mount, func(t tree) (err error) { list, err = t.readDir(name, include); return err })
	return list, err
}

func (c *container) StatFile(_ context.Context, mount int, name string) (st *fstypes.Stat, err error) {
	err = c.look(mount, func(t tree) (err error) { st, err = t.statFile(name); return err })
	return st, err
}

// look calls fn with what a mount shows.
func (c *container) look(mount int, fn func(tree) error) error {
	v, below, release, err := c.View(mount)
	if err != nil {
		return containerError(err)
	}
	return errors.Join(fn(tree{v, below}), release())
}

// process is a frontend.Process.
type process struct{ executor.Running }

func (p process) Signal(sig syscall.Signal) error { return p.Running.Signal(sig) }
