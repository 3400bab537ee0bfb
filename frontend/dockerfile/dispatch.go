package dockerfile

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerfile/shell"
)

// dispatchStages follows the instructions of every stage that is needed.
// Stages stand in the order of the file, so what one uses is done before.
func (c *conversion) dispatchStages(context.Context) error {
	for _, s := range c.needed() {
		for _, warn := range s.warnings {
			warn()
		}
		if s.ready {
			continue
		}
		if err := c.dispatchStage(s); err != nil {
			return err
		}
		s.ready = true
	}
	// All of the result is used, and so all of the context it may start from;
	// only now is it known which set that is.
	c.result.used.add("/")
	return nil
}

func (c *conversion) dispatchStage(s *stage) error {
	s.inherit()
	if s.platform == nil {
		s.platform = &c.target
	}
	s.image.setDefaultPath(s.platform.OS)
	for _, kv := range s.image.Config.Env {
		k, v, _ := strings.Cut(kv, "=")
		s.state = s.state.AddEnv(k, v)
	}
	if c.cfg.hostname != "" {
		s.state = s.state.Hostname(c.cfg.hostname)
	}
	if dir := s.image.Config.WorkingDir; dir != "" {
		if err := s.setWorkdir(dir); err != nil {
			return parser.WithLocation(err, s.src.Location)
		}
	}
	if user := s.image.Config.User; user != "" {
		s.state = s.state.User(user)
	}
	s.state = s.state.Network(c.cfg.network)

	for _, cmd := range s.commands {
		st := &step{conversion: c, stage: s, command: cmd, lint: c.lint.WithMergedConfigFromComments(cmd.Comments())}
		if err := st.dispatch(); err != nil {
			return parser.WithLocation(err, cmd.Location())
		}
	}
	return nil
}

// inherit starts s as its base stage ends.
func (s *stage) inherit() {
	b := s.base
	if b == nil {
		return
	}
	s.state, s.platform, s.workdirSet = b.state, b.platform, b.workdirSet
	s.image = b.image.clone()
	s.image.Config.OnBuild = nil
	s.baseImage = b.baseImage
	s.used = b.used
	s.args = slices.Clone(b.args)
}

// step is one instruction being followed.
type step struct {
	*conversion
	stage   *stage
	command command
	lint    *linter.Linter // with what comments above the instruction say
}

// dispatch expands the words of the instruction and does what it says.
func (st *step) dispatch() error {
	st.stage.inTrigger = st.command.trigger
	if err := st.expand(); err != nil {
		return err
	}
	switch cmd := st.command.Command.(type) {
	case *instructions.EnvCommand:
		return st.env(cmd)
	case *instructions.ArgCommand:
		return st.arg(cmd)
	case *instructions.RunCommand:
		return st.run(cmd)
	case *instructions.CopyCommand:
		return st.copy(cmd)
	case *instructions.AddCommand:
		return st.add(cmd)
	case *instructions.WorkdirCommand:
		return st.workdir(cmd)
	case *instructions.UserCommand:
		return st.user(cmd)
	case *instructions.LabelCommand:
		return st.label(cmd)
	case *instructions.CmdCommand:
		return st.cmd(cmd)
	case *instructions.EntrypointCommand:
		return st.entrypoint(cmd)
	case *instructions.HealthCheckCommand:
		return st.healthcheck(cmd)
	case *instructions.ExposeCommand:
		return st.expose(cmd)
	case *instructions.VolumeCommand:
		return st.volume(cmd)
	case *instructions.StopSignalCommand:
		return st.stopSignal(cmd)
	case *instructions.ShellCommand:
		return st.shell(cmd)
	case *instructions.MaintainerCommand:
		return st.maintainer(cmd)
	case *instructions.OnbuildCommand:
		st.stage.image.Config.OnBuild = append(st.stage.image.Config.OnBuild, cmd.Expression)
		return nil
	}
	return fmt.Errorf("internal error: instruction %s has no meaning", st.command.Name())
}

// expand replaces variables by what they were before the instruction. ARG does
// so by itself, for its default may not count.
func (st *step) expand() error {
	env := st.stage.state.Env()
	expand := func(lex *shell.Lex) instructions.SingleWordExpander {
		return func(word string) (string, error) {
			out, err := expandWord(lex, word, env)
			st.lintUndefined(st.command, out.Unmatched, env)
			return out.Result, err
		}
	}
	cmd := st.command.Command
	if _, isArg := cmd.(*instructions.ArgCommand); !isArg {
		if e, ok := cmd.(instructions.SupportsSingleWordExpansion); ok {
			if err := e.Expand(expand(st.lex)); err != nil {
				return err
			}
		}
	}
	// Inline documents keep their quotes, and always escape by backslash.
	if e, ok := cmd.(instructions.SupportsSingleWordExpansionRaw); ok {
		lex := shell.NewLex('\\')
		lex.SkipProcessQuotes = true
		return e.ExpandRaw(expand(lex))
	}
	return nil
}

// history notes the instruction in the image.
func (s *stage) history(createdBy string, layer bool) {
	s.image.addHistory(createdBy, layer, s.epoch)
}
