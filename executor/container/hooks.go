//go:build linux && (amd64 || arm64)

package container

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

func (c *Container) hooks() specs.Hooks {
	if c.Spec == nil || c.Spec.Hooks == nil {
		return specs.Hooks{}
	}
	return *c.Spec.Hooks
}

// checkHooks refuses hooks that could never run.
func checkHooks(h *specs.Hooks) error {
	if h == nil {
		return nil
	}
	for kind, list := range map[string][]specs.Hook{
		"prestart": prestart(h), "createRuntime": h.CreateRuntime, "createContainer": h.CreateContainer,
		"startContainer": h.StartContainer, "poststart": h.Poststart, "poststop": h.Poststop,
	} {
		for _, hook := range list {
			switch {
			case !filepath.IsAbs(hook.Path):
				return fmt.Errorf("hooks.%s: path %q must be absolute", kind, hook.Path)
			case hook.Timeout != nil && *hook.Timeout <= 0:
				return fmt.Errorf("hooks.%s: timeout %d of %s must be greater than zero", kind, *hook.Timeout, hook.Path)
			}
		}
	}
	return nil
}

// holds says whether there are hooks for a container that isn't complete.
func holds(h *specs.Hooks) bool {
	return h != nil && len(prestart(h))+len(h.CreateRuntime)+len(h.CreateContainer) > 0
}

// prestart returns hooks of a kind that is deprecated, and used.
func prestart(h *specs.Hooks) []specs.Hook {
	//lint:ignore SA1019 see above
	return h.Prestart
}

// hooksBeforePivot runs what comes between the making of namespaces and
// mounts and the change of the root.
func (c *Container) hooksBeforePivot(ctx context.Context) error {
	h := c.hooks()
	c.hooked = true
	if err := c.runHooks(ctx, "prestart", prestart(&h), Creating); err != nil {
		return err
	}
	if err := c.runHooks(ctx, "createRuntime", h.CreateRuntime, Creating); err != nil {
		return err
	}
	return c.hooksInside(ctx, "createContainer", h.CreateContainer, Creating)
}

// startHooks run inside the complete container.
func (c *Container) startHooks(ctx context.Context) error {
	return c.hooksInside(ctx, "startContainer", c.hooks().StartContainer, Created)
}

// hooksAfter run when nothing is left of the container. One that fails keeps
// neither the others from running nor the container from being gone.
func (c *Container) hooksAfter(ctx context.Context) error {
	var errs []error
	for _, h := range c.hooks().Poststop {
		errs = append(errs, c.runHooks(ctx, "poststop", []specs.Hook{h}, Stopped))
	}
	err := errors.Join(errs...)
	if err == nil || c.warn == nil {
		return err
	}
	c.warn(fmt.Errorf("container %s is deleted, but %w", c.ID, err))
	return nil
}

// hookState is what hooks read from standard input; pid is that of the
// container's process as they see it.
func (c *Container) hookState(status Status, pid int) ([]byte, error) {
	s := specs.State{Version: c.Spec.Version, ID: c.ID, Status: specs.ContainerState(status.String()), Bundle: c.Bundle, Annotations: c.Spec.Annotations}
	if status != Stopped {
		s.Pid = pid
	}
	return json.Marshal(s)
}

// innerPid is the pid of the container's process in its own PID namespace.
func (c *Container) innerPid() (int, error) {
	file := fmt.Sprintf("/proc/%d/status", c.Pid)
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, fmt.Errorf("find pid in container: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if pids, ok := strings.CutPrefix(line, "NSpid:"); ok {
			fields := strings.Fields(pids) // in each namespace, from the outermost
			return strconv.Atoi(fields[len(fields)-1])
		}
	}
	return 0, fmt.Errorf("find pid in container: %s has no line NSpid", file)
}

// hookContext ends when the hook has to.
func hookContext(ctx context.Context, h specs.Hook) (context.Context, context.CancelFunc) {
	if h.Timeout == nil {
		return context.WithCancel(ctx)
	}
	limit := time.Duration(*h.Timeout) * time.Second
	return context.WithTimeoutCause(ctx, limit, fmt.Errorf("it took longer than its timeout of %s", limit))
}

// hookWaitDelay is how long what a hook left behind may hold its output.
const hookWaitDelay = time.Second

// runHooks runs hooks outside of the container, one after the other, up to the
// first that fails.
func (c *Container) runHooks(ctx context.Context, kind string, hooks []specs.Hook, status Status) error {
	if len(hooks) == 0 {
		return nil
	}
	state, err := c.hookState(status, c.Pid)
	if err != nil {
		return err
	}
	for _, h := range hooks {
		if err := runHook(ctx, h, state, c.Bundle); err != nil {
			return fmt.Errorf("run %s hook %s: %w", kind, h.Path, err)
		}
	}
	return nil
}

func runHook(ctx context.Context, h specs.Hook, state []byte, dir string) error {
	ctx, cancel := hookContext(ctx, h)
	defer cancel()
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, h.Path)
	if len(h.Args) > 0 {
		cmd.Args = h.Args
	}
	cmd.Env, cmd.Dir = append([]string{}, h.Env...), dir
	cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.WaitDelay = bytes.NewReader(state), &out, &out, hookWaitDelay
	err := cmd.Run()
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return hookError(err, &out)
}

// hookError adds what a hook printed to why it failed.
func hookError(err error, out *bytes.Buffer) error {
	if text := bytes.TrimSpace(out.Bytes()); err != nil && len(text) > 0 {
		return fmt.Errorf("%w: %s", err, text)
	}
	return err
}

// hooksInside runs hooks in the container's namespaces.
func (c *Container) hooksInside(ctx context.Context, kind string, hooks []specs.Hook, status Status) error {
	if len(hooks) == 0 {
		return nil
	}
	pid, err := c.innerPid()
	if err != nil {
		return err
	}
	state, err := c.hookState(status, pid)
	if err != nil {
		return err
	}
	for _, h := range hooks {
		if err := c.runInside(ctx, h, state); err != nil {
			return fmt.Errorf("run %s hook %s: %w", kind, h.Path, err)
		}
	}
	return nil
}

// runInside runs one hook as the container's process would be run, with files
// for its input and output, which nobody has to copy.
func (c *Container) runInside(ctx context.Context, h specs.Hook, state []byte) (err error) {
	ctx, cancel := hookContext(ctx, h)
	defer cancel()
	var files []*os.File
	defer func() {
		for _, f := range files {
			err = errors.Join(err, f.Close(), os.Remove(f.Name()))
		}
	}()
	for range 2 {
		f, err := os.CreateTemp(c.dir, "hook")
		if err != nil {
			return err
		}
		files = append(files, f)
	}
	in, out := files[0], files[1]
	if _, err := in.WriteAt(state, 0); err != nil {
		return err
	}
	p := *c.Spec.Process
	p.Args, p.Env, p.Cwd, p.Terminal = h.Args, h.Env, "/", false
	if len(p.Args) == 0 {
		p.Args = []string{h.Path}
	}
	s, err := c.setup(&p, IO{Stdio: [3]*os.File{in, out, out}})
	if err != nil {
		return err
	}
	s.Program, s.Filter, s.Spec.Process.Env = h.Path, nil, h.Env
	proc, err := c.enter(ctx, s, nil)
	if err != nil {
		return err
	}
	status, err := proc.Wait(ctx, 0)
	if err != nil {
		return errors.Join(err, proc.end())
	}
	if status.Code() != 0 {
		err = fmt.Errorf("exit status %d", status.Code())
	}
	text, rerr := os.ReadFile(out.Name())
	return hookError(errors.Join(err, rerr), bytes.NewBuffer(text))
}
