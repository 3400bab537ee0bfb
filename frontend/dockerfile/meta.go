package dockerfile

import (
	"errors"
	"fmt"

	"github.com/kilnbuild/kiln/client/llb"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/sys/signal"
)

// Instructions that change the config; of them WORKDIR alone makes a layer.

func (st *step) workdir(cmd *instructions.WorkdirCommand) error {
	s := st.stage
	if rule := &linter.RuleWorkdirRelativePath; !s.workdirSet && !isAbs(cmd.Path, s.platform.OS) {
		st.lint.Run(rule, cmd.Location(), rule.Format(cmd.Path))
	}
	s.workdirSet = true
	if err := s.setWorkdir(cmd.Path); err != nil {
		return err
	}
	dir := s.state.GetDir()
	if dir == "/" {
		s.history("WORKDIR /", false)
		return nil
	}
	opts := []llb.MkdirOption{llb.WithParents(true)}
	if user := s.image.Config.User; user != "" {
		opts = append(opts, llb.WithUser(user))
	}
	if s.epoch != nil {
		opts = append(opts, llb.WithCreatedTime(*s.epoch))
	}
	env := s.state.Env()
	s.state = s.state.File(llb.Mkdir(dir, 0o755, opts...),
		llb.WithCustomName(s.vertexName(displayName(cmd.String(), st.lex, env), s.platform, env)),
		st.location(cmd.Location()),
		llb.Platform(*s.platform),
	)
	s.history("WORKDIR "+dir, true)
	return nil
}

// setWorkdir sets the working directory of commands and of the image.
func (s *stage) setWorkdir(dir string) error {
	os := s.platform.OS
	dir, err := resolvePath(s.image.Config.WorkingDir, dir, os, false)
	if err != nil {
		return fmt.Errorf("working directory: %w", err)
	}
	s.image.Config.WorkingDir = fromSlash(dir, os)
	s.state = s.state.Dir(dir)
	return nil
}

func (st *step) user(cmd *instructions.UserCommand) error {
	s := st.stage
	s.state = s.state.User(cmd.User)
	s.image.Config.User = cmd.User
	s.history("USER "+cmd.User, false)
	return nil
}

func (st *step) label(cmd *instructions.LabelCommand) error {
	s, text := st.stage, "LABEL"
	if s.image.Config.Labels == nil {
		s.image.Config.Labels = make(map[string]string, len(cmd.Labels))
	}
	for _, kv := range cmd.Labels {
		st.lintDelimiter(kv.NoDelim, cmd)
		s.image.Config.Labels[kv.Key] = kv.Value
		text += " " + kv.String()
	}
	s.history(text, false)
	return nil
}

func (st *step) cmd(cmd *instructions.CmdCommand) error {
	s := st.stage
	st.lintOnce(cmd, &s.cmd)
	args := st.shellArgs(cmd, cmd.ShellDependantCmdLine)
	s.image.Config.Cmd = args
	//lint:ignore SA1019 Docker for Windows still reads it
	s.image.Config.ArgsEscaped = true
	s.history(fmt.Sprintf("CMD %q", args), false)
	return nil
}

// entrypoint also drops the command of the base, which was meant for another
// entrypoint.
func (st *step) entrypoint(cmd *instructions.EntrypointCommand) error {
	s := st.stage
	st.lintOnce(cmd, &s.entrypoint)
	args := st.shellArgs(cmd, cmd.ShellDependantCmdLine)
	s.image.Config.Entrypoint = args
	if !s.cmd.seen {
		s.image.Config.Cmd = nil
	}
	s.history(fmt.Sprintf("ENTRYPOINT %q", args), false)
	return nil
}

// shellArgs is a command line of CMD or ENTRYPOINT.
func (st *step) shellArgs(cmd instructions.Command, line instructions.ShellDependantCmdLine) []string {
	if !line.PrependShell {
		return line.CmdLine
	}
	img := &st.stage.image
	if len(img.Config.Shell) == 0 {
		rule := &linter.RuleJSONArgsRecommended
		st.lint.Run(rule, cmd.Location(), rule.Format(cmd.Name()))
	}
	return img.withShell(line.CmdLine)
}

func (st *step) healthcheck(cmd *instructions.HealthCheckCommand) error {
	s := st.stage
	st.lintOnce(cmd, &s.healthcheck)
	h := dockerspec.HealthcheckConfig{
		Test:          cmd.Health.Test,
		Interval:      cmd.Health.Interval,
		Timeout:       cmd.Health.Timeout,
		StartPeriod:   cmd.Health.StartPeriod,
		StartInterval: cmd.Health.StartInterval,
		Retries:       cmd.Health.Retries,
	}
	s.image.Config.Healthcheck = &h
	s.history(fmt.Sprintf("HEALTHCHECK %+v", h), false)
	return nil
}

func (st *step) volume(cmd *instructions.VolumeCommand) error {
	s := st.stage
	if s.image.Config.Volumes == nil {
		s.image.Config.Volumes = map[string]struct{}{}
	}
	for _, v := range cmd.Volumes {
		if v == "" {
			return errors.New("VOLUME specified can not be an empty string")
		}
		s.image.Config.Volumes[v] = struct{}{}
	}
	s.history(fmt.Sprintf("VOLUME %v", cmd.Volumes), false)
	return nil
}

func (st *step) stopSignal(cmd *instructions.StopSignalCommand) error {
	if _, err := signal.ParseSignal(cmd.Signal); err != nil {
		return err
	}
	st.stage.image.Config.StopSignal = cmd.Signal
	st.stage.history("STOPSIGNAL "+cmd.Signal, false)
	return nil
}

func (st *step) shell(cmd *instructions.ShellCommand) error {
	st.stage.image.Config.Shell = cmd.Shell
	st.stage.history(fmt.Sprintf("SHELL %v", []string(cmd.Shell)), false)
	return nil
}

func (st *step) maintainer(cmd *instructions.MaintainerCommand) error {
	st.stage.image.Author = cmd.Maintainer
	st.stage.history("MAINTAINER "+cmd.Maintainer, false)
	return nil
}
