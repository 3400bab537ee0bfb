package ops

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/ops/sessiontest"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/secrets"
	"github.com/moby/buildkit/session/sshforward"
	"github.com/moby/buildkit/solver/pb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

func makeExecutable(path string) error { return os.Chmod(path, 0o755) }

func secretMount(dest string, opt *pb.SecretOpt) *pb.Mount {
	return &pb.Mount{Input: -1, Dest: dest, Output: -1, MountType: pb.MountType_SECRET, SecretOpt: opt}
}

func sshMount(dest string, opt *pb.SSHOpt) *pb.Mount {
	return &pb.Mount{Input: -1, Dest: dest, Output: -1, MountType: pb.MountType_SSH, SSHOpt: opt}
}

var scratchRoot = &pb.Mount{Input: -1, Dest: "/"}

// compat: LLB-047, SES-070
func TestSecretFiles(t *testing.T) {
	var seen []string
	b := newExecBench(t, func(_ context.Context, _ executor.Process, at map[string]string) error {
		for _, dest := range []string{"/run/a", "/run/b"} {
			dt, err := os.ReadFile(at[dest])
			if err != nil {
				return err
			}
			info, err := os.Stat(at[dest])
			if err != nil {
				return err
			}
			st := info.Sys().(*syscall.Stat_t)
			seen = append(seen, fmt.Sprintf("%s %s %d %d %v", dest, dt, st.Uid, st.Gid, info.Mode()))
			if err := os.WriteFile(at[dest], nil, 0o600); !errors.Is(err, syscall.EROFS) {
				t.Errorf("a process can write to %s: %v", dest, err)
			}
		}
		if _, ok := at["/run/c"]; ok {
			t.Error("an optional secret that nobody has is mounted")
		}
		return nil
	})
	who := b.session(sessiontest.Secrets{"a": "alpha", "b": "beta"}.Service())
	b.run(b.op(&pb.ExecOp{Mounts: []*pb.Mount{scratchRoot,
		secretMount("/run/a", &pb.SecretOpt{ID: "a", Uid: 1, Gid: 2, Mode: 0o400}),
		secretMount("/run/b", &pb.SecretOpt{ID: "b", Mode: 0o550}),
		secretMount("/run/c", &pb.SecretOpt{ID: "c", Mode: 0o400, Optional: true}),
	}}, 0, nil), who)
	if want := []string{"/run/a alpha 1 2 -r--------", "/run/b beta 0 0 -r-xr-x---"}; !slices.Equal(seen, want) {
		t.Errorf("the process sees %q, want %q", seen, want)
	}
	for _, m := range b.exec.runs[0].Mounts {
		noexec := slices.Contains(m.Source[0].Options, "noexec")
		for _, o := range []string{"ro", "nosuid", "nodev"} {
			if !slices.Contains(m.Source[0].Options, o) {
				t.Errorf("mount %s lacks %s", m.Dest, o)
			}
		}
		if want := m.Dest == "/run/a"; noexec != want || !m.Readonly {
			t.Errorf("mount %s: noexec %v, read-only %v; want %v, true", m.Dest, noexec, m.Readonly, want)
		}
	}
}

// Secrets live in memory, in a file system that is attached nowhere.
func TestSecretsLeaveNoTrace(t *testing.T) {
	b := newExecBench(t, func(_ context.Context, _ executor.Process, at map[string]string) error {
		var fs syscall.Statfs_t
		if err := syscall.Statfs(at["/run/a"], &fs); err != nil {
			return err
		}
		const tmpfsMagic = 0x01021994
		if fs.Type != tmpfsMagic {
			t.Errorf("the secret is on a file system of type %#x", fs.Type)
		}
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			return err
		}
		if bytes.Contains(mounts, []byte("mode=700,noswap")) {
			t.Error("the secret's file system is attached somewhere")
		}
		return nil
	})
	who := b.session(sessiontest.Secrets{"a": "alpha"}.Service())
	b.run(b.op(&pb.ExecOp{Mounts: []*pb.Mount{scratchRoot, secretMount("/run/a", &pb.SecretOpt{ID: "a", Mode: 0o400})}}, 0, nil), who)
}

// The memory of a process with secrets isn't written anywhere, unless it asks
// for that.
func TestNoCoresOfSecrets(t *testing.T) {
	b := newExecBench(t, nil)
	who := b.session(sessiontest.Secrets{"a": "alpha"}.Service())
	file := []*pb.Mount{scratchRoot, secretMount("/run/a", &pb.SecretOpt{ID: "a", Mode: 0o400})}
	ulimit := func(core int64) *pb.Meta {
		return &pb.Meta{Args: []string{"x"}, Ulimit: []*pb.Ulimit{{Name: "core", Soft: core, Hard: core}}}
	}
	none, asked := []executor.Ulimit{{Name: "core", Soft: 1, Hard: 1}}, []executor.Ulimit{{Name: "core", Soft: 4096, Hard: 4096}}
	for name, c := range map[string]struct {
		op   *pb.ExecOp
		want []executor.Ulimit
	}{
		"no secret":     {&pb.ExecOp{Mounts: []*pb.Mount{scratchRoot}}, nil},
		"file":          {&pb.ExecOp{Mounts: file}, none},
		"variable":      {&pb.ExecOp{Mounts: []*pb.Mount{scratchRoot}, Secretenv: []*pb.SecretEnv{{ID: "a", Name: "A"}}}, none},
		"limit of ours": {&pb.ExecOp{Mounts: file, Meta: ulimit(4096)}, asked},
	} {
		b.exec.runs = nil
		b.run(b.op(c.op, 0, nil), who)
		if got := b.exec.runs[0].Ulimits; !slices.Equal(got, c.want) {
			t.Errorf("%s: limits %v, want %v", name, got, c.want)
		}
	}
}

func TestMissingSecret(t *testing.T) {
	b := newExecBench(t, nil)
	who := b.session(sessiontest.Secrets{}.Service())
	for name, e := range map[string]*pb.ExecOp{
		"file":     {Mounts: []*pb.Mount{scratchRoot, secretMount("/run/a", &pb.SecretOpt{ID: "missing"})}},
		"variable": {Mounts: []*pb.Mount{scratchRoot}, Secretenv: []*pb.SecretEnv{{ID: "missing", Name: "M"}}},
	} {
		_, err := b.op(e, 0, nil).Exec(context.Background(), who, nil)
		if !errors.Is(err, secrets.ErrNotFound) || !strings.Contains(err.Error(), `"missing"`) {
			t.Errorf("%s: error is %v", name, err)
		}
	}
	if len(b.exec.runs) != 0 {
		t.Error("it ran all the same")
	}
	_, err := b.op(&pb.ExecOp{Mounts: []*pb.Mount{scratchRoot}, Secretenv: []*pb.SecretEnv{{ID: "a", Name: "A"}}}, 0, nil).Exec(context.Background(), asker{}, nil)
	if !errors.Is(err, session.ErrNoActiveSessions) {
		t.Errorf("without a session: %v", err)
	}
}

// compat: LLB-030
func TestSecretVariables(t *testing.T) {
	b := newExecBench(t, nil)
	who := b.session(sessiontest.Secrets{"tok": "s3cret"}.Service())
	b.run(b.op(&pb.ExecOp{
		Meta:   &pb.Meta{Args: []string{"x"}, Env: []string{"PATH=/bin"}},
		Mounts: []*pb.Mount{scratchRoot},
		Secretenv: []*pb.SecretEnv{
			{ID: "tok", Name: "TOKEN"},
			{ID: "none", Name: "NONE", Optional: true},
		},
	}, 0, nil), who)
	if got, want := b.exec.runs[0].Env, []string{"PATH=/bin", "TOKEN=s3cret", "NONE="}; !slices.Equal(got, want) {
		t.Errorf("env is %q, want %q", got, want)
	}
}

func TestSharingKey(t *testing.T) {
	b := newExecBench(t, nil)
	withSecret := func() *execOp {
		return b.op(&pb.ExecOp{Mounts: []*pb.Mount{scratchRoot, secretMount("/s", &pb.SecretOpt{ID: "s", Optional: true})}}, 0, nil)
	}
	plain := func(proxy string, memory int64) *execOp {
		return b.op(&pb.ExecOp{Meta: &pb.Meta{Args: []string{"x"}, ProxyEnv: &pb.ProxyEnv{HttpProxy: proxy}}, Mounts: []*pb.Mount{scratchRoot}}, 0,
			&pb.OpMetadata{LinuxResources: &pb.LinuxResources{Memory: memory}})
	}
	withSSH := func() *execOp {
		return b.op(&pb.ExecOp{Mounts: []*pb.Mount{scratchRoot, sshMount("/a", &pb.SSHOpt{Optional: true})}}, 0, nil)
	}
	one, same, other, none := b.session(sessiontest.Secrets{"s": "1"}.Service()), b.session(sessiontest.Secrets{"s": "1"}.Service()), b.session(sessiontest.Secrets{"s": "2"}.Service()), b.session(sessiontest.Secrets{}.Service())
	for _, c := range []struct {
		name     string
		op1, op2 *execOp
		a, b     asker
		share    bool
	}{
		{"equal secrets", withSecret(), withSecret(), one, same, true},
		{"different secrets", withSecret(), withSecret(), one, other, false},
		{"no secret", withSecret(), withSecret(), one, none, false},
		{"no secrets read", plain("", 0), plain("", 0), one, other, true},
		{"proxies", plain("a", 0), plain("b", 0), one, one, false},
		{"limits", plain("", 1), plain("", 2), one, one, false},
		{"same agent", withSSH(), withSSH(), one, one, true},
		{"two agents", withSSH(), withSSH(), one, same, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, err := c.op1.SharingKey(context.Background(), c.a)
			if err != nil {
				t.Fatal(err)
			}
			b, err := c.op2.SharingKey(context.Background(), c.b)
			if err != nil {
				t.Fatal(err)
			}
			if (a == b) != c.share {
				t.Errorf("shared: %v, want %v", a == b, c.share)
			}
		})
	}
	key, err := withSecret().SharingKey(context.Background(), one)
	if err != nil {
		t.Fatal(err)
	}
	again, err := newTestLoader(t, Config{Sessions: b.sessions}).Load(single(t, execOf(&pb.ExecOp{Mounts: []*pb.Mount{scratchRoot, secretMount("/s", &pb.SecretOpt{ID: "s", Optional: true})}})), LoadOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if k, err := again.Vertex.Op.(*execOp).SharingKey(context.Background(), one); err != nil || k == key {
		t.Errorf("another loader, which is another process, makes the same hash (%v)", err)
	}
}

// fakeAgent is the client's side of SSH forwarding: it answers what it is sent
// in upper case.
type fakeAgent struct {
	sshforward.UnimplementedSSHServer
	known string
}

func (a fakeAgent) Register(s *grpc.Server) { sshforward.RegisterSSHServer(s, a) }

func (a fakeAgent) CheckAgent(_ context.Context, r *sshforward.CheckAgentRequest) (*sshforward.CheckAgentResponse, error) {
	if r.ID != a.known {
		return nil, status.Errorf(codes.NotFound, "unset ssh forward key %s", r.ID)
	}
	return &sshforward.CheckAgentResponse{}, nil
}

func (a fakeAgent) ForwardAgent(stream grpc.BidiStreamingServer[sshforward.BytesMessage, sshforward.BytesMessage]) error {
	md, _ := metadata.FromIncomingContext(stream.Context())
	if ids := md.Get(sshforward.KeySSHID); !slices.Equal(ids, []string{a.known}) {
		return status.Errorf(codes.InvalidArgument, "ids are %q", ids)
	}
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := stream.Send(&sshforward.BytesMessage{Data: bytes.ToUpper(m.Data)}); err != nil {
			return err
		}
	}
}

// compat: LLB-048, SES-071
func TestSSHSocket(t *testing.T) {
	b := newExecBench(t, func(_ context.Context, _ executor.Process, at map[string]string) error {
		info, err := os.Stat(at["/run/agent"])
		if err != nil {
			return err
		}
		if st := info.Sys().(*syscall.Stat_t); st.Uid != 3 || st.Gid != 4 || info.Mode() != os.ModeSocket|0o600 {
			t.Errorf("the socket is %v of %d:%d", info.Mode(), st.Uid, st.Gid)
		}
		for _, text := range []string{"hello", "again"} {
			conn, err := net.Dial("unix", at["/run/agent"])
			if err != nil {
				return err
			}
			if _, err := conn.Write([]byte(text)); err != nil {
				return err
			}
			if err := conn.(*net.UnixConn).CloseWrite(); err != nil {
				return err
			}
			if got, err := io.ReadAll(conn); err != nil || string(got) != strings.ToUpper(text) {
				t.Errorf("the agent answers %q, %v", got, err)
			}
			conn.Close()
		}
		// One that the process leaves open must not keep the step from ending.
		_, err = net.Dial("unix", at["/run/agent"])
		if _, ok := at["/run/other"]; ok {
			t.Error("an optional key that nobody forwards is mounted")
		}
		return err
	})
	who := b.session(fakeAgent{known: "key"})
	b.run(b.op(&pb.ExecOp{Mounts: []*pb.Mount{scratchRoot,
		sshMount("/run/agent", &pb.SSHOpt{ID: "key", Uid: 3, Gid: 4, Mode: 0o600}),
		sshMount("/run/other", &pb.SSHOpt{ID: "other", Optional: true}),
	}}, 0, nil), who)
}

// compat: LLB-048, SES-071
func TestMissingSSH(t *testing.T) {
	b := newExecBench(t, nil)
	op := b.op(&pb.ExecOp{Mounts: []*pb.Mount{scratchRoot, sshMount("/run/agent", &pb.SSHOpt{ID: "key"})}}, 0, nil)
	_, err := op.Exec(context.Background(), b.session(fakeAgent{known: "other"}), nil)
	if err == nil || !strings.Contains(err.Error(), "unset ssh forward key key") {
		t.Errorf("with another key: %v", err)
	}
	_, err = op.Exec(context.Background(), b.session(), nil)
	if err == nil || !strings.Contains(err.Error(), `no SSH key "key" forwarded from the client`) {
		t.Errorf("without an agent: %v", err)
	}
	// Any of the sessions will do.
	both := append(b.session(), b.session(fakeAgent{known: "key"})...)
	b.run(op, both)
}
