package dockerfile

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/kilnbuild/kiln/client/llb"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// stage is one FROM and what follows it or, made up, an image that --from
// names.
type stage struct {
	src      instructions.Stage
	name     string        // shown in vertex names
	base     *stage        // nil: an image, scratch or a named context
	context  *namedContext // stands in for the whole stage
	deps     []dependency
	commands []command

	resolved  bool // the base was looked up
	triggered bool // the base's ONBUILD was seen
	ready     bool // other stages may use state
	external  bool // made up for an image

	state     llb.State
	image     image
	baseImage *image // as it was found; never changed
	platform  *ocispec.Platform

	args       []instructions.KeyValuePairOptional
	used       *pathSet // what is used of the stage; one with its base's
	noCache    bool
	workdirSet bool // by an instruction, not by the base image
	epoch      *time.Time
	outline    outline
	warnings   []func() // found while bases were resolved in parallel

	steps, stepsTotal int // for vertex names
	showPlatform      bool
	inTrigger         bool // the present instruction is an ONBUILD of the base
	cmd, entrypoint   onlyOnce
	healthcheck       onlyOnce
}

// dependency is a stage that a command uses.
type dependency struct {
	*stage
	command instructions.Command
}

// command is an instruction and the stages that it uses: the one it copies
// from or, for RUN, one per mount, nil where a mount names none.
type command struct {
	instructions.Command
	from    []*stage
	trigger bool
}

// addStages makes the stages of the file.
func (c *conversion) addStages(context.Context) error {
	for i, src := range c.parsed {
		s, err := c.newStage(i, src)
		if err != nil {
			return parser.WithLocation(err, src.Location)
		}
		c.stages = append(c.stages, s)
		if src.Name != "" {
			c.byName[strings.ToLower(src.Name)] = s
		}
	}
	if c.cfg.target == "" {
		c.result = c.stages[len(c.stages)-1]
		return nil
	}
	s, ok := c.byName[strings.ToLower(c.cfg.target)]
	if !ok {
		s, ok = c.byIndex(c.cfg.target)
	}
	if !ok {
		err := fmt.Errorf("target stage %q could not be found", c.cfg.target)
		return suggest(err, c.cfg.target, c.stageNames())
	}
	c.result = s
	return nil
}

// byIndex returns the stage of the file that a number names.
func (c *conversion) byIndex(name string) (*stage, bool) {
	i, err := strconv.Atoi(name)
	if err != nil || i < 0 || i >= len(c.parsed) || i >= len(c.stages) {
		return nil, false
	}
	return c.stages[i], true
}

func (c *conversion) newStage(i int, src instructions.Stage) (*stage, error) {
	lint := c.lint.WithMergedConfigFromComments(src.Comments)
	s := &stage{
		src:          src,
		name:         src.Name,
		used:         &pathSet{},
		noCache:      c.cfg.skipsCache(src.Name),
		epoch:        c.epoch,
		outline:      c.outline.clone(),
		showPlatform: c.cfg.multiPlatform,
	}
	usedArgs, err := c.expandFrom(s, lint)
	if err != nil {
		return nil, err
	}
	if src.Name != "" {
		if s.context, err = c.namedContext(src.Name, s.platformOr(c), s.used); err != nil {
			return nil, err
		}
		if s.context != nil {
			return s, nil
		}
	} else {
		s.name = fmt.Sprintf("stage-%d", i)
	}
	if base, ok := c.byName[s.src.BaseName]; ok {
		s.base = base
		s.outline = base.outline.clone()
	}
	s.outline.use(usedArgs)
	if s.base == nil && s.src.BaseName != scratchName {
		if err := checkBaseName(s.src.BaseName); err != nil {
			return nil, err
		}
		s.stepsTotal++
	}
	for _, cmd := range src.Commands {
		switch cmd.(type) {
		case *instructions.AddCommand, *instructions.CopyCommand, *instructions.RunCommand, *instructions.WorkdirCommand:
			s.stepsTotal++
		}
	}
	return s, nil
}

// platformOr is the platform that FROM names, or else the one asked for.
func (s *stage) platformOr(c *conversion) *ocispec.Platform {
	if s.platform == nil && !c.implicit {
		return &c.target
	}
	return s.platform
}

// expandFrom expands the base name and platform, by global arguments alone, and
// returns those that were used.
func (c *conversion) expandFrom(s *stage, lint *linter.Linter) (map[string]struct{}, error) {
	name, err := expandWord(c.lex, s.src.BaseName, c.globals)
	c.lintUndefinedInFrom(name.Unmatched, s.src.Location, lint)
	if err != nil {
		return nil, err
	}
	if name.Result == "" {
		return nil, fmt.Errorf("base name (%s) should not be blank", s.src.BaseName)
	}
	s.src.BaseName = name.Result
	if s.src.Platform == "" {
		return name.Matched, nil
	}

	expr := s.src.Platform
	word, err := expandWord(c.lex, expr, c.globals)
	c.lintUndefinedInFrom(word.Unmatched, s.src.Location, lint)
	c.lintTargetPlatform(expr, word, s.src.Location, lint)
	lintConstPlatform(s.src, word, lint)
	if err != nil {
		return nil, fmt.Errorf("failed to process arguments for platform %s: %w", word.Result, err)
	}
	if word.Result == "" {
		return nil, c.suggestGlobal(fmt.Errorf("empty platform value from expression %s", expr), word.Unmatched)
	}
	p, err := platforms.Parse(word.Result)
	if err != nil {
		return nil, c.suggestGlobal(fmt.Errorf("failed to parse platform %s: %w", expr, err), word.Unmatched)
	}
	s.platform = &p
	return join(name.Matched, word.Matched), nil
}

// suggestGlobal adds a global argument that an unknown one is near to.
func (c *conversion) suggestGlobal(err error, unknown map[string]struct{}) error {
	for _, word := range sortedKeys(unknown) {
		if better := suggest(err, word, c.globals.Keys()); better != err {
			return better
		}
	}
	return err
}

func (c *conversion) stageNames() []string {
	var names []string
	for _, s := range c.stages {
		if s.name != "" {
			names = append(names, s.name)
		}
	}
	return names
}

// link finds the stages that commands use.
func (c *conversion) link(context.Context) error {
	alone := len(c.stages) == 1
	for _, s := range slices.Clone(c.stages) {
		if s.context != nil {
			continue
		}
		for _, cmd := range s.src.Commands {
			linked, err := c.newCommand(s, cmd)
			if err != nil {
				return parser.WithLocation(err, cmd.Location())
			}
			alone = alone && len(linked.from) == 0
			s.commands = append(s.commands, linked)
		}
	}
	if err := c.checkCircles(); err != nil {
		return err
	}
	// A file with one stage that uses nothing else needs no stage names.
	if alone {
		c.stages[0].name = ""
	}
	return nil
}

func (c *conversion) newCommand(s *stage, cmd instructions.Command) (command, error) {
	linked := command{Command: cmd}
	switch cmd := cmd.(type) {
	case *instructions.CopyCommand:
		if cmd.From == "" {
			return linked, nil
		}
		from, err := c.copySource(cmd)
		if err != nil {
			return linked, err
		}
		linked.from = []*stage{from}
	case *instructions.RunCommand:
		for _, m := range instructions.GetMounts(cmd) {
			var from *stage
			if m.From != "" {
				var err error
				if from, err = c.stageOrImage(m.From, cmd.Location()); err != nil {
					return linked, err
				}
			}
			linked.from = append(linked.from, from)
		}
	}
	for _, from := range linked.from {
		if from != nil {
			s.deps = append(s.deps, dependency{from, cmd})
		}
	}
	return linked, nil
}

func (c *conversion) copySource(cmd *instructions.CopyCommand) (*stage, error) {
	word, err := expandWord(c.lex, cmd.From, llb.EnvList{})
	if err != nil {
		return nil, err
	}
	if word.Result != cmd.From {
		return nil, errors.New("variable expansion is not supported for --from, define a new stage with FROM using ARG from global scope as a workaround")
	}
	if _, err := strconv.Atoi(cmd.From); err == nil {
		s, ok := c.byIndex(cmd.From)
		if !ok {
			return nil, fmt.Errorf("invalid stage index %s", cmd.From)
		}
		return s, nil
	}
	return c.stageOrImage(cmd.From, cmd.Location())
}

// stageOrImage returns the stage of that name or one made for the image.
func (c *conversion) stageOrImage(name string, location []parser.Range) (*stage, error) {
	if s, ok := c.byName[strings.ToLower(name)]; ok {
		return s, nil
	}
	if err := checkBaseName(name); err != nil {
		return nil, err
	}
	s := &stage{src: instructions.Stage{BaseName: name, Location: location}, used: &pathSet{}, ready: true, external: true}
	c.stages = append(c.stages, s)
	return s, nil
}

// checkBaseName refuses what names neither an image nor a context.
func checkBaseName(name string) error {
	if _, err := reference.ParseNormalizedNamed(name); err != nil {
		return fmt.Errorf("failed to parse stage name %q: %w", name, err)
	}
	return nil
}

// needed returns the stages that the result needs, in the order of c.stages.
func (c *conversion) needed() []*stage {
	seen := map[*stage]bool{}
	var visit func(s *stage)
	visit = func(s *stage) {
		if seen[s] {
			return
		}
		seen[s] = true
		if s.base != nil {
			visit(s.base)
		}
		for _, d := range s.deps {
			visit(d.stage)
		}
	}
	visit(c.result)
	if c.allStages {
		for _, s := range c.stages {
			visit(s)
		}
	}
	var out []*stage
	for _, s := range c.stages {
		if seen[s] {
			out = append(out, s)
		}
	}
	return out
}

// checkCircles refuses stages that need themselves.
func (c *conversion) checkCircles() error {
	const open, closed = 1, 2
	state := map[*stage]int{}
	var visit func(s *stage, path []instructions.Command) error
	visit = func(s *stage, path []instructions.Command) error {
		state[s] = open
		defer func() { state[s] = closed }()
		for _, d := range s.deps {
			next := append(slices.Clip(path), d.command)
			switch state[d.stage] {
			case open:
				err := fmt.Errorf("circular dependency detected on stage: %s", d.name)
				for _, cmd := range next {
					err = parser.WithLocation(err, cmd.Location())
				}
				return err
			case closed:
				continue
			}
			if err := visit(d.stage, next); err != nil {
				return err
			}
		}
		return nil
	}
	for _, s := range c.stages {
		if state[s] == closed {
			continue
		}
		if err := visit(s, nil); err != nil {
			return err
		}
	}
	return nil
}
