package ops

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/ops/sessiontest"
	gatewaypb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	"google.golang.org/grpc/codes"
)

// container makes a container on the given mounts besides the root.
func (b *realBench) container(t *testing.T, who asker, mounts []*pb.Mount, inputs ...*cache.Ref) *Container {
	t.Helper()
	c, err := b.NewContainer(t.Context(), context.Background(), ContainerRequest{
		Name: "c", Group: sessionGroup(who),
		Mounts: append([]*pb.Mount{rootMount()}, mounts...), Inputs: append([]*cache.Ref{b.rootfs}, inputs...),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("close container: %v", err)
		}
	})
	return c
}

// in runs a script in c.
func in(c *Container, script string, change ...func(*ContainerProcess)) (string, error) {
	var out bytes.Buffer
	p := ContainerProcess{Meta: &pb.Meta{Args: []string{"/bin/busybox", "sh", "-c", script}}, Stdout: &out, Stderr: &out}
	for _, fn := range change {
		fn(&p)
	}
	err := c.Run(context.Background(), p)
	return out.String(), err
}

// hold starts a first process that lasts until the returned function is called.
func hold(t *testing.T, c *Container) (release func() error) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	up, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- c.Run(context.Background(), ContainerProcess{
			Meta: &pb.Meta{Args: []string{"/bin/busybox", "cat"}}, Stdin: r, Started: func(executor.Running) { close(up) },
		})
	}()
	select {
	case <-up:
	case err := <-ended:
		t.Fatalf("the first process ended: %v", err)
	}
	return func() error { w.Close(); return <-ended }
}

// read reads a file through the container's view of a mount.
func read(t *testing.T, c *Container, mount int, name string) string {
	t.Helper()
	v, selector, release, err := c.View(mount)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := release(); err != nil {
			t.Error(err)
		}
	}()
	dt, err := os.ReadFile(filepath.Join(v.Path(), selector, name))
	if err != nil {
		t.Error(err)
	}
	return string(dt)
}

// compat: GW-051, GW-060, GW-061
func TestContainer(t *testing.T) {
	b := newRealBench(t, "")
	who := b.session(sessiontest.Secrets{"s": "hush"}.Service())
	data := b.ref(nil, fileSet{"d/f": "data"})
	c := b.container(t, who, []*pb.Mount{
		{Input: 1, Dest: "/ro", Readonly: true},
		{Input: 1, Dest: "/sub", Selector: "d"},
		{Input: -1, Dest: "/t", MountType: pb.MountType_TMPFS},
		{Input: -1, Dest: "/c", MountType: pb.MountType_CACHE, CacheOpt: &pb.CacheOpt{ID: "shared"}},
		secretMount("/run/s", &pb.SecretOpt{ID: "s", Mode: 0o400}),
		secretMount("/run/none", &pb.SecretOpt{ID: "none", Optional: true}),
	}, data)

	// What can't be started isn't the first process.
	_, err := in(c, "", func(p *ContainerProcess) { p.Meta.Args = []string{"/nope"} })
	var exit *gatewaypb.ExitError
	if !errors.As(err, &exit) || exit.ExitCode != 127 {
		t.Errorf("error %v, want exit code 127", err)
	}
	release := hold(t, c)
	const script = `/bin/busybox cat /ro/d/f /sub/f /run/s; echo; test -e /run/none || echo none; ` +
		`echo new > /sub/f; echo t > /t/f; echo c > /c/f; echo r > /f; (echo x > /ro/f) 2>/dev/null || echo read-only; echo $PATH $TERM; pwd`
	out, err := in(c, script)
	if want := "datadatahush\nnone\nread-only\n" + defaultPath + "\n/\n"; err != nil || out != want {
		t.Errorf("printed %q (%v), want %q", out, err, want)
	}
	for mount, want := range map[int]string{0: "r\n", 2: "new\n", 3: "t\n", 4: "c\n"} {
		if got := read(t, c, mount, "f"); got != want {
			t.Errorf("mount %d has %q, want %q", mount, got, want)
		}
	}
	if got := read(t, c, 5, ""); got != "hush" {
		t.Errorf("the secret is %q", got)
	}
	for _, mount := range []int{-1, 6, 7} {
		if _, _, _, err := c.View(mount); err == nil {
			t.Errorf("there is a mount %d", mount)
		}
	}
	if out, err := in(c, "echo $TERM $A", func(p *ContainerProcess) {
		p.Terminal, p.SecretEnv = true, []*pb.SecretEnv{{ID: "s", Name: "A"}}
	}); err != nil || out != "xterm hush\r\n" {
		t.Errorf("on a terminal: %q, %v", out, err)
	}
	if err := release(); err != nil {
		t.Errorf("first process: %v", err)
	}
	if _, err := in(c, "true"); !errors.Is(err, executor.ErrEnded) {
		t.Errorf("error %v, want %v", err, executor.ErrEnded)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if _, err := in(c, "true"); !errors.Is(err, errContainerClosed) {
		t.Errorf("error %v, want %v", err, errContainerClosed)
	}
	if _, _, _, err := c.View(0); !errors.Is(err, errContainerClosed) {
		t.Errorf("error %v, want %v", err, errContainerClosed)
	}
	wantFiles(t, "the input", Result{data}, fileSet{"d/f": "data"})
	// The cache mount stays.
	printed, err := b.sh(who, "cat /c/f", []*pb.Mount{{Input: -1, Dest: "/c", Output: -1, MountType: pb.MountType_CACHE, CacheOpt: &pb.CacheOpt{ID: "shared"}}})
	if err != nil || printed != "c\n" {
		t.Errorf("a step finds %q in the cache mount (%v)", printed, err)
	}
}

// Close ends what runs, and what it runs for is told why.
func TestContainerCloses(t *testing.T) {
	b := newRealBench(t, "")
	for name, end := range map[string]func(c *Container, life func(error)){
		"closed": func(c *Container, _ func(error)) {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		},
		"life ends": func(_ *Container, life func(error)) { life(errContainerClosed) },
	} {
		t.Run(name, func(t *testing.T) {
			life, cancel := context.WithCancelCause(context.Background())
			defer cancel(nil)
			c, err := b.NewContainer(t.Context(), life, ContainerRequest{Name: "c", Mounts: []*pb.Mount{rootMount()}, Inputs: []*cache.Ref{b.rootfs}})
			if err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 2)
			up := make(chan struct{}, 2)
			for range 2 {
				go func() {
					_, err := in(c, "while true; do /bin/busybox sleep 1000; done", func(p *ContainerProcess) {
						p.Started = func(executor.Running) { up <- struct{}{} }
					})
					ended <- err
				}()
			}
			<-up
			<-up
			end(c, cancel)
			for range 2 {
				if err := <-ended; !errors.Is(err, errContainerClosed) {
					t.Errorf("error %v", err)
				}
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// compat: GW-063
func TestContainersRefused(t *testing.T) {
	b := newExecBench(t, nil)
	base := b.ref(nil, fileSet{"a": "b"})
	for name, c := range map[string]struct {
		req  ContainerRequest
		code codes.Code
		want string
	}{
		"no mounts":    {ContainerRequest{}, codes.InvalidArgument, "exec.mounts: "},
		"no root":      {ContainerRequest{Mounts: []*pb.Mount{{Input: -1, Dest: "/x"}}}, codes.InvalidArgument, "exec.mounts: "},
		"nil mount":    {ContainerRequest{Mounts: []*pb.Mount{nil}}, codes.InvalidArgument, "exec.mounts[0]: "},
		"no such type": {ContainerRequest{Mounts: []*pb.Mount{rootMount(), {Input: -1, Dest: "/x", MountType: 99}}}, codes.InvalidArgument, "exec.mounts[1].mountType: "},
		"no options":   {ContainerRequest{Mounts: []*pb.Mount{rootMount(), {Input: -1, Dest: "/x", MountType: pb.MountType_SSH}}}, codes.InvalidArgument, "exec.mounts[1].SSHOpt: "},
		"root secret":  {ContainerRequest{Mounts: []*pb.Mount{{Dest: "/", MountType: pb.MountType_TMPFS}}}, codes.InvalidArgument, "exec.mounts[0].mountType: "},
		"host network": {ContainerRequest{Mounts: []*pb.Mount{rootMount()}, Network: pb.NetMode_HOST}, codes.PermissionDenied, "network.host"},
		"no network":   {ContainerRequest{Mounts: []*pb.Mount{rootMount()}, Network: 9}, codes.InvalidArgument, "exec.network: "},
		"bad host":     {ContainerRequest{Mounts: []*pb.Mount{rootMount()}, ExtraHosts: []*pb.HostIP{{Host: "a", IP: "b"}}}, codes.InvalidArgument, "extraHosts[0].IP"},
	} {
		t.Run(name, func(t *testing.T) {
			c.req.Inputs = []*cache.Ref{base}
			_, err := b.NewContainer(t.Context(), context.Background(), c.req)
			var de *DefinitionError
			if !errors.As(err, &de) || de.Code != c.code || !strings.Contains(de.Error(), c.want) {
				t.Errorf("error %v, want %s and %q", err, c.code, c.want)
			}
		})
	}
	c, err := b.NewContainer(t.Context(), context.Background(), ContainerRequest{Name: "c", Mounts: []*pb.Mount{rootMount()}, Inputs: []*cache.Ref{base}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for name, p := range map[string]ContainerProcess{
		"meta": {}, "args": {Meta: &pb.Meta{}},
		"security.insecure": {Meta: &pb.Meta{Args: []string{"x"}}, Security: pb.SecurityMode_INSECURE},
		"secret ID":         {Meta: &pb.Meta{Args: []string{"x"}}, SecretEnv: []*pb.SecretEnv{{Name: "A"}}},
	} {
		if err := c.Run(t.Context(), p); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("error %v, want %q in it", err, name)
		}
	}
}
