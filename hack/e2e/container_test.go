//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	gateway "github.com/moby/buildkit/frontend/gateway/client"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/moby/buildkit/solver/pb"
	"github.com/moby/buildkit/util/apicaps"
	"golang.org/x/sync/errgroup"
)

// driven runs a build that fn drives through upstream's client.
func (d *daemon) driven(opts client.SolveOpt, fn gateway.BuildFunc) error {
	d.t.Helper()
	ctx, cancel := context.WithTimeout(d.t.Context(), time.Minute)
	defer cancel()
	c, err := client.New(ctx, d.addr)
	if err != nil {
		d.t.Fatal(err)
	}
	defer c.Close()
	opts.Session = append(opts.Session, secretsprovider.FromMap(map[string][]byte{"s": []byte("hush")}))
	_, err = c.Build(ctx, opts, "", fn, nil)
	return err
}

// solveImage is a reference to the test image, with one more step.
func solveImage(ctx context.Context, g gateway.Client, step string) (gateway.Reference, error) {
	st := llb.Image(env.base)
	if step != "" {
		st = st.Run(llb.Shlex(step)).Root()
	}
	def, err := st.Marshal(ctx)
	if err != nil {
		return nil, err
	}
	res, err := g.Solve(ctx, gateway.SolveRequest{Definition: def.ToPB(), Evaluate: true})
	if err != nil {
		return nil, err
	}
	return res.SingleRef()
}

// nopCloser is a buffer that a process writes to.
type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// inContainer runs a script in ctr and returns what it printed.
func inContainer(ctx context.Context, ctr gateway.Container, script string, change func(*gateway.StartRequest)) (string, error) {
	var out bytes.Buffer
	req := gateway.StartRequest{Args: []string{"sh", "-c", script}, Stdout: nopCloser{&out}, Stderr: nopCloser{&out}}
	if change != nil {
		change(&req)
	}
	p, err := ctr.Start(ctx, req)
	if err != nil {
		return "", err
	}
	err = p.Wait()
	return out.String(), err
}

// What upstream's Go client offers its callers works.
// compat: GW-050, GW-051, GW-052, GW-053, GW-054, GW-055, GW-056, GW-057, GW-058, GW-059, GW-060, GW-061, GW-062
// compat: GW-C19, GW-C20, GW-C21, GW-C22, GW-C23
func TestGatewayContainers(t *testing.T) {
	d := newDaemon(t)
	err := d.driven(client.SolveOpt{}, func(ctx context.Context, g gateway.Client) (*gateway.Result, error) {
		caps := g.BuildOpts().Caps
		if env.runtime != "" {
			if err := caps.Supports(gwpb.CapGatewayExec); err == nil || !strings.Contains(err.Error(), "built-in runtime") {
				t.Errorf("the daemon says it has containers with %s: %v", env.runtime, err)
			}
			return gateway.NewResult(), nil
		}
		for _, c := range []apicaps.CapID{gwpb.CapGatewayExec, gwpb.CapGatewayExecExtraHosts, gwpb.CapGatewayExecSecretEnv, gwpb.CapGatewayExecSignals, gwpb.CapGatewayExecFilesystem} {
			if err := caps.Supports(c); err != nil {
				t.Error(err)
			}
		}
		ref, err := solveImage(ctx, g, `sh -c "echo made > /made"`)
		if err != nil {
			return nil, err
		}
		containerTest(ctx, t, g, ref)
		return gateway.NewResult(), nil
	})
	if err != nil {
		t.Error(err)
	}
}

func containerTest(ctx context.Context, t *testing.T, g gateway.Client, ref gateway.Reference) {
	ctr, err := g.NewContainer(ctx, gateway.NewContainerRequest{
		Hostname: "box", ExtraHosts: []*pb.HostIP{{Host: "far", IP: "192.0.2.1"}}, NetMode: pb.NetMode_NONE,
		Mounts: []gateway.Mount{
			{Dest: "/", Ref: ref, MountType: pb.MountType_BIND},
			{Dest: "/ro", Ref: ref, MountType: pb.MountType_BIND, Readonly: true},
			{Dest: "/c", MountType: pb.MountType_CACHE, CacheOpt: &pb.CacheOpt{ID: "c"}},
			{Dest: "/run/s", MountType: pb.MountType_SECRET, SecretOpt: &pb.SecretOpt{ID: "s"}},
			{Dest: "/t", MountType: pb.MountType_TMPFS},
		},
	})
	if err != nil {
		t.Error(err)
		return
	}
	in, feed := io.Pipe()
	first, err := ctr.Start(ctx, gateway.StartRequest{Args: []string{"cat"}, Stdin: in})
	if err != nil {
		t.Error(err)
		return
	}
	for _, c := range []struct {
		name, script, want string
		change             func(*gateway.StartRequest)
	}{
		{"mounts", "cat /made /ro/made /run/s; echo x > /t/f; echo y > /c/f; (echo no > /ro/f) 2>/dev/null || echo read-only", "made\nmade\nhushread-only\n", nil},
		{"names", "hostname; grep far /etc/hosts", "box\n192.0.2.1\tfar\n", nil},
		{"network", "cat /proc/net/dev | grep -c :", "1\n", nil},
		{"environment", "echo $A $B; pwd", "a hush\n/tmp\n", func(r *gateway.StartRequest) {
			r.Env, r.Cwd, r.SecretEnv = []string{"A=a"}, "/tmp", []*pb.SecretEnv{{ID: "s", Name: "B"}}
		}},
		{"input", "cat", "typed", func(r *gateway.StartRequest) { r.Stdin = io.NopCloser(strings.NewReader("typed")) }},
		{"much", "seq 100000 | tail -c 7", "100000\n", nil},
	} {
		if out, err := inContainer(ctx, ctr, c.script, c.change); err != nil || out != c.want {
			t.Errorf("%s: printed %q (%v), want %q", c.name, out, err, c.want)
		}
	}
	out, err := inContainer(ctx, ctr, "exit 5", nil)
	var exit *gwpb.ExitError
	if !errors.As(err, &exit) || exit.ExitCode != 5 {
		t.Errorf("printed %q and ended with %v, want exit code 5", out, err)
	}
	if data, err := ctr.ReadFile(ctx, gateway.ReadContainerRequest{ReadRequest: gateway.ReadRequest{Filename: "/f"}, MountIndex: 4}); err != nil || string(data) != "x\n" {
		t.Errorf("read %q, %v", data, err)
	}
	if list, err := ctr.ReadDir(ctx, gateway.ReadDirContainerRequest{ReadDirRequest: gateway.ReadDirRequest{Path: "/"}, MountIndex: 2}); err != nil || len(list) != 1 || list[0].Path != "f" {
		t.Errorf("read %v, %v", list, err)
	}
	if _, err := ctr.StatFile(ctx, gateway.StatContainerRequest{StatRequest: gateway.StatRequest{Path: "/../../../made"}}); err != nil {
		t.Error(err)
	}
	terminalTest(ctx, t, ctr)
	// The first process ends all others.
	var eg errgroup.Group
	last, err := ctr.Start(ctx, gateway.StartRequest{Args: []string{"sleep", "1000"}})
	if err != nil {
		t.Error(err)
		return
	}
	eg.Go(last.Wait)
	feed.Close()
	if err := first.Wait(); err != nil {
		t.Errorf("first process: %v", err)
	}
	if err := eg.Wait(); !errors.As(err, &exit) || exit.ExitCode != 137 {
		t.Errorf("a process of a container that has ended: %v", err)
	}
	if err := ctr.Release(ctx); err != nil {
		t.Error(err)
	}
	if err := ctr.Release(ctx); err == nil {
		t.Error("a container can be released twice")
	}
}

// terminalTest: size and signals of a process with a terminal.
func terminalTest(ctx context.Context, t *testing.T, ctr gateway.Container) {
	r, w := io.Pipe()
	p, err := ctr.Start(ctx, gateway.StartRequest{
		Args: []string{"sh", "-c", "trap 'stty size' WINCH; trap 'echo interrupted; exit 4' INT; echo ready $TERM; while true; do sleep 1000 & wait; done"},
		Tty:  true, Stdin: io.NopCloser(strings.NewReader("")), Stdout: w, Stderr: w,
	})
	if err != nil {
		t.Error(err)
		return
	}
	var all strings.Builder
	await := func(want string) {
		buf := make([]byte, 1024)
		for !strings.Contains(all.String(), want) {
			n, err := r.Read(buf)
			all.Write(buf[:n])
			if err != nil {
				t.Errorf("no %q in %q: %v", want, all.String(), err)
				return
			}
		}
	}
	watchdog := time.AfterFunc(30*time.Second, func() { r.CloseWithError(errors.New("it takes too long")) })
	defer watchdog.Stop()
	await("ready xterm")
	if err := p.Resize(ctx, gateway.WinSize{Rows: 12, Cols: 34}); err != nil {
		t.Error(err)
	}
	await("12 34")
	if err := p.Signal(ctx, syscall.SIGINT); err != nil {
		t.Error(err)
	}
	await("interrupted")
	go io.Copy(io.Discard, r)
	var exit *gwpb.ExitError
	if err := p.Wait(); !errors.As(err, &exit) || exit.ExitCode != 4 {
		t.Errorf("it ended with %v, want exit code 4", err)
	}
}

// A debugger starts a container from the results that come with an error, as
// buildx does, with what the step was given and with what it left.
// compat: GW-064, CTL-086, LLB-034, BCL-094
func TestDebugFailedStep(t *testing.T) {
	d := newDaemon(t)
	if env.runtime != "" {
		return // TestGatewayContainers has seen that there are no containers
	}
	err := d.driven(client.SolveOpt{}, func(ctx context.Context, g gateway.Client) (*gateway.Result, error) {
		_, err := solveImage(ctx, g, `sh -c "echo half > /half; exit 7"`)
		var failed *errdefs.SolveError
		if !errors.As(err, &failed) || failed.Solve.Op.GetExec() == nil || len(failed.Solve.MountIDs) != 1 || len(failed.Solve.InputIDs) != 1 {
			t.Errorf("the error has no details: %v", err)
			return nil, err
		}
		for id, want := range map[string]string{failed.Solve.InputIDs[0]: "none\n", failed.Solve.MountIDs[0]: "half\n"} {
			ctr, cerr := g.NewContainer(ctx, gateway.NewContainerRequest{Mounts: []gateway.Mount{{Dest: "/", ResultID: id, MountType: pb.MountType_BIND}}})
			if cerr != nil {
				t.Error(cerr)
				continue
			}
			if out, err := inContainer(ctx, ctr, "cat /half 2>/dev/null || echo none", nil); err != nil || out != want {
				t.Errorf("printed %q (%v), want %q", out, err, want)
			}
		}
		return nil, err // the containers end with the build
	})
	if err == nil || !strings.Contains(err.Error(), "exit code: 7") {
		t.Errorf("the build ended with %v", err)
	}
}

// What isn't allowed, or makes no sense, is refused by name.
// compat: GW-063
func TestContainersRefused(t *testing.T) {
	d := newDaemon(t)
	if env.runtime != "" {
		return // as above
	}
	if err := d.driven(client.SolveOpt{}, func(ctx context.Context, g gateway.Client) (*gateway.Result, error) {
		ref, err := solveImage(ctx, g, "")
		if err != nil {
			return nil, err
		}
		root := gateway.Mount{Dest: "/", Ref: ref, MountType: pb.MountType_BIND}
		for want, req := range map[string]gateway.NewContainerRequest{
			"network.host":      {Mounts: []gateway.Mount{root}, NetMode: pb.NetMode_HOST},
			"mounts: ":          {},
			"no result nothing": {Mounts: []gateway.Mount{{Dest: "/", ResultID: "nothing", MountType: pb.MountType_BIND}}},
			"mounts[1].SSHOpt":  {Mounts: []gateway.Mount{root, {Dest: "/x", MountType: pb.MountType_SSH}}},
			"\"nope\"":          {Mounts: []gateway.Mount{root, {Dest: "/x", MountType: pb.MountType_SECRET, SecretOpt: &pb.SecretOpt{ID: "nope"}}}},
			"s390x":             {Mounts: []gateway.Mount{root}, Platform: &pb.Platform{OS: "linux", Architecture: "s390x"}},
		} {
			if _, err := g.NewContainer(ctx, req); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("error %v, want %q in it", err, want)
			}
		}
		ctr, err := g.NewContainer(ctx, gateway.NewContainerRequest{Mounts: []gateway.Mount{root}})
		if err != nil {
			return nil, err
		}
		if _, err := inContainer(ctx, ctr, "true", func(r *gateway.StartRequest) { r.SecurityMode = pb.SecurityMode_INSECURE }); err == nil || !strings.Contains(err.Error(), "security.insecure") {
			t.Errorf("error %v", err)
		}
		if _, err := inContainer(ctx, ctr, "true", func(r *gateway.StartRequest) { r.User = "nobody-there" }); err == nil || !strings.Contains(err.Error(), "nobody-there") {
			t.Errorf("error %v", err)
		}
		return gateway.NewResult(), nil
	}); err != nil {
		t.Error(err)
	}
}
