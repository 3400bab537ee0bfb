package dockerfile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/kilnbuild/kiln/client/llb"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerfile/shell"
	"github.com/moby/patternmatcher"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// conversion turns the Dockerfile into LLB for one platform. Expanding words
// changes the parsed instructions, so each conversion parses anew.
type conversion struct {
	*build
	target    ocispec.Platform
	implicit  bool                // no platform was asked for
	warn      linter.LintWarnFunc // nil: don't lint
	allStages bool                // convert what the target doesn't need, too

	lint      *linter.Linter
	escape    rune
	lex       *shell.Lex
	globals   llb.EnvList // arguments before the first FROM
	buildArgs map[string]string
	outline   outline // of the globals
	epoch     *time.Time

	parsed     []instructions.Stage
	globalCmds []instructions.ArgCommand // before the first FROM
	stages     []*stage                  // those of the file, then those made for --from
	byName     map[string]*stage
	result     *stage

	used    pathSet   // of the main context
	sources llb.State // the main context
	ignored *patternmatcher.PatternMatcher
}

// convertOptions say how to convert.
type convertOptions struct {
	platform  *ocispec.Platform // nil: whatever the base image is
	warn      linter.LintWarnFunc
	allStages bool
}

// convert converts the target stage; errors in the Dockerfile have a location.
func (b *build) convert(ctx context.Context, opt convertOptions) (*conversion, error) {
	c := &conversion{
		build:     b,
		target:    b.cfg.buildPlatform,
		implicit:  opt.platform == nil,
		warn:      opt.warn,
		allStages: opt.allStages,
		buildArgs: maps.Clone(b.cfg.buildArgs),
		byName:    map[string]*stage{},
	}
	if opt.platform != nil {
		c.target = *opt.platform
	}
	c.sources = llb.Defer(func() (llb.State, error) { return b.mainContext(ctx, &c.used) })
	for _, step := range []func(context.Context) error{
		c.parse, c.setGlobals, c.setEpoch, c.addStages, c.link, c.fetch, c.dispatchStages, c.finish,
	} {
		if err := step(ctx); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// parse reads the Dockerfile into stages and checks what needs no more than
// that.
func (c *conversion) parse(context.Context) error {
	if len(c.file.Data) == 0 {
		return errors.New("the Dockerfile cannot be empty")
	}
	var err error
	if c.lint, err = c.newLinter(); err != nil {
		return err
	}
	file, err := parser.Parse(bytes.NewReader(c.file.Data))
	if err != nil {
		return err
	}
	for _, w := range file.Warnings {
		if rule := &linter.RuleNoEmptyContinuation; w.URL == rule.URL {
			c.lint.Run(rule, []parser.Range{*w.Location}, rule.Format())
		}
	}
	c.escape = file.EscapeToken
	c.lex = shell.NewLex(file.EscapeToken)

	stages, globals, err := instructions.Parse(file.AST, c.lint)
	if err != nil {
		return err
	}
	if len(stages) == 0 {
		return errors.New("dockerfile contains no stages to build")
	}
	c.parsed, c.globalCmds = stages, globals
	c.lintStageNames()
	c.lintCasing()
	return nil
}

// fetch asks for everything that the instructions need: base images and, at the
// same time, the ignore file.
func (c *conversion) fetch(ctx context.Context) error {
	eg, ctx := errgroup.WithContext(ctx)
	eg.Go(func() error { return c.resolveBases(ctx) })
	eg.Go(func() error {
		patterns, err := c.ignorePatterns(ctx)
		if err != nil || len(patterns) == 0 {
			return err
		}
		if c.ignored, err = patternmatcher.New(patterns); err != nil {
			return fmt.Errorf("ignore patterns of the build context: %w", err)
		}
		return nil
	})
	return eg.Wait()
}

// finish gives the target what it has beyond its instructions.
func (c *conversion) finish(context.Context) error {
	img := &c.result.image
	if len(c.cfg.labels) > 0 && img.Config.Labels == nil {
		img.Config.Labels = map[string]string{}
	}
	maps.Copy(img.Config.Labels, c.cfg.labels)
	if err := c.lint.Error(); err != nil {
		return err
	}
	if !c.implicit {
		img.setPlatform(c.target)
	}
	img.Platform = normalize(img.Platform)
	return nil
}

// setPlatform makes the image one for p. What p leaves open stays if it is not
// about another machine.
func (img *image) setPlatform(p ocispec.Platform) {
	same := p.OS == img.OS && p.Architecture == img.Architecture
	img.OS, img.Architecture = p.OS, p.Architecture
	if p.Variant != "" || !same {
		img.Variant = p.Variant
	}
	if p.OSVersion != "" || !same {
		img.OSVersion = p.OSVersion
	}
	if p.OSFeatures != nil {
		img.OSFeatures = slices.Clone(p.OSFeatures)
	}
}

// marshalOptions are those for every state of the conversion.
func (c *conversion) marshalOptions() []llb.ConstraintsOpt {
	return []llb.ConstraintsOpt{llb.Platform(c.target)}
}

// location points to the Dockerfile.
func (c *conversion) location(ranges []parser.Range) llb.ConstraintsOpt {
	return c.file.Location(toRanges(ranges))
}

// description carries the instruction as it was written.
func description(source string) llb.ConstraintsOpt {
	return llb.WithDescription(map[string]string{"com.docker.dockerfile.v1.command": source})
}
