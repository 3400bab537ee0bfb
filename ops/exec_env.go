package ops

import (
	"context"
	"slices"
	"strings"

	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
)

// defaultPath is what a step finds its programs in if nothing else is said.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// environment is the op's own, then the proxies (LLB-021), PATH where it is
// missing (LLB-020), and the secrets (LLB-030).
func (s *step) environment(ctx context.Context) ([]string, error) {
	secrets, err := s.loader.secretEnv(ctx, s.group, s.op.Secretenv)
	return append(plainEnv(s.op.Meta), secrets...), err
}

// plainEnv is the environment without secrets.
func plainEnv(meta *pb.Meta) []string {
	env := slices.Concat(meta.Env, proxyEnv(meta.ProxyEnv))
	if !hasVariable(env, "PATH") {
		env = append(env, "PATH="+defaultPath)
	}
	return env
}

// secretEnv asks the sessions of g for the values of variables.
func (l *Loader) secretEnv(ctx context.Context, g session.Group, list []*pb.SecretEnv) (env []string, err error) {
	for _, opt := range list {
		value, _, err := l.secret(ctx, g, opt.ID, opt.Optional)
		if err != nil {
			return nil, err
		}
		env = append(env, opt.Name+"="+string(value))
	}
	return env, nil
}

func hasVariable(env []string, name string) bool {
	return slices.ContainsFunc(env, func(e string) bool { return strings.HasPrefix(e, name+"=") })
}

func proxyEnv(p *pb.ProxyEnv) []string {
	var env []string
	for _, v := range []struct{ name, value string }{
		{"http_proxy", p.GetHttpProxy()},
		{"https_proxy", p.GetHttpsProxy()},
		{"ftp_proxy", p.GetFtpProxy()},
		{"no_proxy", p.GetNoProxy()},
		{"all_proxy", p.GetAllProxy()},
	} {
		if v.value != "" {
			env = append(env, strings.ToUpper(v.name)+"="+v.value, v.name+"="+v.value)
		}
	}
	return env
}
