package dockerfile

import (
	"fmt"
	"path"
	"strconv"
	"strings"

	"github.com/kilnbuild/kiln/client/llb"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerfile/shell"
)

// run runs a command. It may read any file, so all of the stage is used.
func (st *step) run(cmd *instructions.RunCommand) error {
	s := st.stage
	s.used.add("/")
	args, opts, summary, err := st.runArgs(cmd)
	if err != nil {
		return err
	}
	opts = append(opts, llb.Args(args), description(cmd.String()), st.location(cmd.Location()))
	if s.noCache {
		opts = append(opts, llb.IgnoreCache)
	}
	if proxy, ok := st.proxyEnv(); ok {
		opts = append(opts, llb.WithProxy(proxy))
	}
	flagged, err := st.runFlags(cmd)
	if err != nil {
		return err
	}
	opts = append(opts, flagged...)
	opts = append(opts, st.runConfig()...)

	lex := shell.NewLex(st.escape)
	lex.RawQuotes, lex.SkipUnsetEnv = true, true
	env := s.state.Env()
	name := displayName(cmd.String()+summary, lex, maskSecrets(cmd, env))
	opts = append(opts, llb.WithCustomName(s.vertexName(name, s.state.GetPlatform(), env)))

	s.state = s.state.Run(opts...).Root()
	s.history("RUN "+s.argsBefore(args, env)+" # buildkit", true)
	return nil
}

// runArgs is the command, with the options that an inline script needs and what
// the vertex name says of it.
func (st *step) runArgs(cmd *instructions.RunCommand) (args []string, opts []llb.RunOption, summary string, _ error) {
	args = cmd.CmdLine
	img := &st.stage.image
	if len(cmd.Files) > 0 {
		if len(args) != 1 || !cmd.PrependShell {
			return nil, nil, "", fmt.Errorf("parsing produced an invalid run command: %v", args)
		}
		if parser.MustParseHeredoc(args[0]) == nil {
			args = []string{rebuildDocuments(args[0], cmd.Files)}
		} else {
			// A single document is the script itself. Whether its delimiter
			// was quoted doesn't matter: the shell expands variables.
			doc := cmd.Files[0]
			data := doc.Data
			if doc.Chomp {
				data = parser.ChompHeredocContent(data)
			}
			summary = fmt.Sprintf(" (%s)", documentSummary(doc.Data))
			args = []string{data}
			if img.OS != "windows" && strings.HasPrefix(data, "#!") {
				const dir = "/dev/pipes/"
				args = []string{path.Join(dir, doc.Name)}
				opts = append(opts, llb.AddMount(dir, st.inlineFile(doc.Name, 0o755, data), llb.SourcePath("/"), llb.Readonly))
			}
		}
	}
	if cmd.PrependShell {
		args = img.withShell(args)
	}
	return args, opts, summary, nil
}

// rebuildDocuments makes a script whose inline documents the shell reads.
func rebuildDocuments(line string, files []instructions.ShellInlineFile) string {
	var b strings.Builder
	b.WriteString(line)
	for _, f := range files {
		b.WriteString("\n" + f.Data + f.Name)
	}
	return b.String()
}

// runFlags are the options that the flags of RUN say.
func (st *step) runFlags(cmd *instructions.RunCommand) ([]llb.RunOption, error) {
	opts, err := st.mounts(cmd)
	if err != nil {
		return nil, err
	}
	switch mode := instructions.GetSecurity(cmd); mode {
	case instructions.SecurityInsecure:
		opts = append(opts, llb.Security(llb.SecurityModeInsecure))
	case instructions.SecuritySandbox:
		opts = append(opts, llb.Security(llb.SecurityModeSandbox))
	default:
		return nil, fmt.Errorf("unsupported security mode %q", mode)
	}
	switch mode := instructions.GetNetwork(cmd); mode {
	case instructions.NetworkDefault:
	case instructions.NetworkNone:
		opts = append(opts, llb.Network(llb.NetModeNone))
	case instructions.NetworkHost:
		opts = append(opts, llb.Network(llb.NetModeHost))
	default:
		return nil, fmt.Errorf("unsupported network mode %q", mode)
	}
	for _, d := range instructions.GetDevices(cmd) {
		opts = append(opts, llb.AddCDIDevice(d.Name, !d.Required))
	}
	return opts, nil
}

// runConfig are the options that the request says for every command.
func (c *conversion) runConfig() []llb.RunOption {
	var opts []llb.RunOption
	for _, u := range c.cfg.ulimits {
		opts = append(opts, llb.AddUlimit(llb.UlimitName(u.Name), u.Soft, u.Hard))
	}
	for _, h := range c.cfg.extraHosts {
		opts = append(opts, llb.AddExtraHost(h.Host, h.IP))
	}
	if c.cfg.shmSize > 0 {
		opts = append(opts, llb.AddMount("/dev/shm", llb.Scratch(), llb.Tmpfs(c.cfg.shmSize)))
	}
	if c.cfg.cgroupParent != "" {
		opts = append(opts, llb.WithCgroupParent(c.cfg.cgroupParent))
	}
	if c.cfg.resources != nil {
		opts = append(opts, llb.WithLinuxResources(*c.cfg.resources))
	}
	return opts
}

// argsBefore is the command as the history has it: after the arguments that
// were declared, "|1 A=b cmd".
func (s *stage) argsBefore(cmd []string, env shell.EnvGetter) string {
	var args []string
	index := map[string]int{}
	for _, a := range s.args {
		v, ok := env.Get(a.Key)
		if !ok {
			v = a.ValueString()
		}
		i, ok := index[a.Key]
		if !ok {
			i = len(args)
			index[a.Key] = i
			args = append(args, "")
		}
		args[i] = a.Key + "=" + v
	}
	if len(args) > 0 {
		args = append([]string{"|" + strconv.Itoa(len(args))}, args...)
	}
	return strings.Join(append(args, cmd...), " ")
}

// maskedEnv shows variables that come from secrets as stars. It has no secrets
// itself; it tells the reader that the value is one.
type maskedEnv struct {
	shell.EnvGetter
	masked llb.EnvList
}

func maskSecrets(cmd *instructions.RunCommand, env shell.EnvGetter) shell.EnvGetter {
	m := maskedEnv{EnvGetter: env}
	for _, mount := range instructions.GetMounts(cmd) {
		if mount.Type == instructions.MountTypeSecret && mount.Env != nil {
			m.masked = m.masked.AddOrReplace(*mount.Env, "****")
		}
	}
	return m
}

func (m maskedEnv) Get(key string) (string, bool) {
	if v, ok := m.masked.Get(key); ok {
		return v, true
	}
	return m.EnvGetter.Get(key)
}
