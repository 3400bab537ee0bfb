package dockerfile

import (
	"context"
	"maps"
	"strings"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/kilnbuild/kiln/client/llb"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const epochArg = "SOURCE_DATE_EPOCH"

// notInEnv reports whether an argument is about what is scanned for a bill of
// materials, and not for commands.
func notInEnv(arg string) bool {
	return arg == "BUILDKIT_SBOM_SCAN_CONTEXT" || arg == "BUILDKIT_SBOM_SCAN_STAGE"
}

func normalize(p ocispec.Platform) ocispec.Platform { return platforms.Normalize(p) }

// setGlobals sets the arguments that FROM may use: those about platforms and
// the ARGs before the first FROM.
func (c *conversion) setGlobals(context.Context) error {
	predefined := c.predefinedArgs()
	c.lintDefaultBases(predefined)
	var err error
	c.globals, c.outline.args, err = c.evalGlobals(predefined, c.buildArgs)
	return err
}

func (c *conversion) predefinedArgs() llb.EnvList {
	b, t := c.cfg.buildPlatform, c.target
	stage := firstOf(c.cfg.target, c.parsed[len(c.parsed)-1].Name, "default")
	var env llb.EnvList
	for _, kv := range [][2]string{
		{"BUILDPLATFORM", platforms.Format(b)},
		{"BUILDOS", b.OS},
		{"BUILDOSVERSION", b.OSVersion},
		{"BUILDARCH", b.Architecture},
		{"BUILDVARIANT", b.Variant},
		{"TARGETPLATFORM", platforms.FormatAll(t)},
		{"TARGETOS", t.OS},
		{"TARGETOSVERSION", t.OSVersion},
		{"TARGETARCH", t.Architecture},
		{"TARGETVARIANT", t.Variant},
		{"TARGETSTAGE", stage},
	} {
		value := kv[1]
		if v, ok := c.buildArgs[kv[0]]; ok {
			value = v
		}
		env = env.AddOrReplace(kv[0], value)
	}
	return env
}

// evalGlobals adds the ARGs before the first FROM to env.
func (c *conversion) evalGlobals(env llb.EnvList, buildArgs map[string]string) (llb.EnvList, map[string]argInfo, error) {
	infos := map[string]argInfo{}
	for _, cmd := range c.globalCmds {
		for _, arg := range cmd.Args {
			info := argInfo{definition: arg, location: cmd.Location()}
			value := arg.Value
			if v, ok := buildArgs[arg.Key]; ok {
				value = &v
			} else if value != nil {
				word, err := expandWord(c.lex, *value, env)
				if err != nil {
					return env, nil, parser.WithLocation(err, cmd.Location())
				}
				value, info.deps = &word.Result, maps.Clone(word.Matched)
				if _, ok := info.deps[arg.Key]; ok {
					delete(info.deps, arg.Key)
					info.deps = join(info.deps, infos[arg.Key].deps)
				}
			}
			if value != nil {
				env = env.AddOrReplace(arg.Key, *value)
				info.value = *value
			}
			infos[arg.Key] = info
		}
	}
	return env, infos, nil
}

// lintDefaultBases warns of base names that make no sense without build args.
func (c *conversion) lintDefaultBases(predefined llb.EnvList) {
	env, _, err := c.evalGlobals(predefined, nil)
	if err != nil {
		return // it fails the same way, with a location, when it matters
	}
	for _, s := range c.parsed {
		word, err := expandWord(c.lex, s.BaseName, env)
		if err != nil {
			return
		}
		if _, err := reference.ParseNormalizedNamed(word.Result); err != nil {
			rule := &linter.RuleInvalidDefaultArgInFrom
			c.lint.Run(rule, s.Location, rule.Format(s.BaseName))
		}
	}
}

// proxyEnv are the proxies among the build args, which commands see without
// declaring them.
func (c *conversion) proxyEnv() (p llb.ProxyEnv, ok bool) {
	fields := map[string]*string{
		"http_proxy": &p.HTTPProxy, "https_proxy": &p.HTTPSProxy, "ftp_proxy": &p.FTPProxy,
		"no_proxy": &p.NoProxy, "all_proxy": &p.AllProxy,
	}
	for _, k := range sortedKeys(c.buildArgs) {
		if field := fields[strings.ToLower(k)]; field != nil {
			*field, ok = c.buildArgs[k], true
		}
	}
	return p, ok
}

// env sets a variable for the following instructions and the image.
func (st *step) env(cmd *instructions.EnvCommand) error {
	s, text := st.stage, "ENV"
	for _, kv := range cmd.Env {
		st.lintDelimiter(kv.NoDelim, cmd)
		st.lintSecretName("ENV", kv.Key)
		s.state = s.state.AddEnv(kv.Key, kv.Value)
		s.image.setEnv(kv.Key, kv.Value)
		text += " " + kv.String()
	}
	s.history(text, false)
	return nil
}

// arg declares arguments: a build arg has precedence over the default, and an
// argument without either is the global one of its name.
func (st *step) arg(cmd *instructions.ArgCommand) error {
	s := st.stage
	var texts []string
	for _, arg := range cmd.Args {
		st.lintSecretName("ARG", arg.Key)
		inherited, err := st.argValue(cmd, &arg)
		if err != nil {
			return err
		}
		text := arg.Key
		if arg.Value != nil {
			text += "=" + *arg.Value
			if !notInEnv(arg.Key) {
				s.state = s.state.AddEnv(arg.Key, *arg.Value)
			}
		}
		if !inherited {
			s.outline.declare(arg, cmd.Location())
		}
		s.outline.use(map[string]struct{}{arg.Key: {}})
		s.args = append(s.args, arg)
		texts = append(texts, text)
	}
	s.history("ARG "+strings.Join(texts, " "), false)
	return nil
}

// argValue sets the value of arg and tells whether it is the global one's.
func (st *step) argValue(cmd *instructions.ArgCommand, arg *instructions.KeyValuePairOptional) (inherited bool, _ error) {
	if v, ok := st.buildArgs[arg.Key]; ok {
		arg.Value = &v
		return false, nil
	}
	if arg.Value == nil {
		v, ok := st.globals.Get(arg.Key)
		if ok {
			arg.Value = &v
		}
		return ok, nil
	}
	env := st.stage.state.Env()
	word, err := expandWord(st.lex, *arg.Value, env)
	st.lintUndefined(cmd, word.Unmatched, env)
	arg.Value = &word.Result
	return false, err
}
