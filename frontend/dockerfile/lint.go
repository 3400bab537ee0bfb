package dockerfile

import (
	"context"
	"path"
	"regexp"
	"strings"

	"github.com/containerd/platforms"
	"github.com/kilnbuild/kiln/internal/progress"
	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/frontend/dockerfile/shell"
	"github.com/moby/patternmatcher"
)

// newLinter makes the linter as the request or else the Dockerfile configures
// it.
func (c *conversion) newLinter() (*linter.Linter, error) {
	var cfg linter.Config
	if c.cfg.lint != nil {
		cfg = *c.cfg.lint
	} else {
		v, _, where, _ := parser.ParseDirective("check", c.file.Data)
		parsed, err := linter.ParseLintOptions(v)
		if err != nil {
			return nil, parser.WithLocation(err, where)
		}
		cfg = *parsed
	}
	cfg.Warn = c.warn
	return linter.New(&cfg), nil
}

// showWarning reports a finding at the step that loaded the Dockerfile.
func (b *build) showWarning(ctx context.Context) linter.LintWarnFunc {
	info := b.file.Info()
	return func(rule, description, url, msg string, where []parser.Range) {
		line := 0
		if len(where) > 0 {
			line = where[0].Start.Line
		}
		b.bridge.Warn(ctx, progress.Warning{
			Vertex:     b.fileVertex,
			Level:      1,
			Short:      []byte(linter.LintFormatShort(rule, msg, line)),
			Detail:     [][]byte{[]byte(description)},
			URL:        url,
			SourceInfo: info,
			Ranges:     toRanges(where),
		})
	}
}

func (c *conversion) lintStageNames() {
	seen := map[string]bool{}
	for _, s := range c.parsed {
		if s.Name == "" {
			continue
		}
		if rule := &linter.RuleReservedStageName; s.Name == "context" || s.Name == scratchName {
			c.lint.Run(rule, s.Location, rule.Format(s.Name))
		}
		if rule := &linter.RuleDuplicateStageName; seen[s.Name] {
			c.lint.Run(rule, s.Location, rule.Format(s.Name))
		}
		seen[s.Name] = true
	}
}

// lintCasing warns of instructions that are not written like most.
func (c *conversion) lintCasing() {
	type word struct {
		name  string
		where []parser.Range
	}
	var words []word
	for _, s := range c.parsed {
		words = append(words, word{s.OrigCmd, s.Location})
		for _, cmd := range s.Commands {
			words = append(words, word{cmd.Name(), cmd.Location()})
		}
	}
	lower, upper := 0, 0
	for _, w := range words {
		switch w.name {
		case strings.ToLower(w.name):
			lower++
		case strings.ToUpper(w.name):
			upper++
		}
	}
	change, should := strings.ToUpper, "uppercase"
	if lower > upper {
		change, should = strings.ToLower, "lowercase"
	}
	for _, w := range words {
		if rule := &linter.RuleConsistentInstructionCasing; w.name != change(w.name) {
			c.lint.Run(rule, w.where, rule.Format(w.name, should))
		}
	}
}

// lintUndefinedInFrom warns of arguments that FROM uses and nothing declares.
func (c *conversion) lintUndefinedInFrom(unknown map[string]struct{}, where []parser.Range, lint *linter.Linter) {
	declared := map[string]struct{}{}
	for _, info := range c.outline.args {
		declared[info.definition.Key] = struct{}{}
	}
	for _, k := range c.globals.Keys() {
		declared[k] = struct{}{}
	}
	for _, arg := range sortedKeys(unknown) {
		if _, ok := declared[arg]; ok {
			continue
		}
		rule := &linter.RuleUndefinedArgInFrom
		lint.Run(rule, where, rule.Format(arg, nearest(arg, sortedKeys(declared))))
	}
}

// lintTargetPlatform warns of --platform=$TARGETPLATFORM, the default.
func (c *conversion) lintTargetPlatform(expr string, word shell.ProcessWordResult, where []parser.Range, lint *linter.Linter) {
	const arg = "TARGETPLATFORM"
	if _, ok := word.Matched[arg]; !ok || len(word.Matched) != 1 || len(word.Unmatched) > 0 {
		return
	}
	if v, _ := c.globals.Get(arg); v == word.Result {
		rule := &linter.RuleRedundantTargetPlatform
		lint.Run(rule, where, rule.Format(expr))
	}
}

// lintConstPlatform warns of a fixed platform, unless the stage is named for it.
func lintConstPlatform(s instructions.Stage, word shell.ProcessWordResult, lint *linter.Linter) {
	if len(word.Matched) > 0 || len(word.Unmatched) > 0 {
		return
	}
	p, err := platforms.Parse(word.Result)
	if err != nil || strings.Contains(s.Name, p.OS) || strings.Contains(s.Name, p.Architecture) {
		return
	}
	rule := &linter.RuleFromPlatformFlagConstDisallowed
	lint.Run(rule, s.Location, rule.Format(word.Result))
}

// lintUndefined warns of variables that are not set and not declared.
func (st *step) lintUndefined(cmd instructions.Command, unknown map[string]struct{}, env shell.EnvGetter) {
	declared := map[string]bool{}
	for _, a := range st.stage.args {
		declared[a.Key] = true
	}
	for _, name := range sortedKeys(unknown) {
		if declared[name] || notInEnv(name) {
			continue
		}
		rule := &linter.RuleUndefinedVar
		st.lint.Run(rule, cmd.Location(), rule.Format(name, nearest(name, env.Keys())))
	}
}

// lintDelimiter warns of "ENV key value".
func (st *step) lintDelimiter(missing bool, cmd instructions.Command) {
	if rule := &linter.RuleLegacyKeyValueFormat; missing {
		st.lint.Run(rule, cmd.Location(), rule.Format(cmd.Name()))
	}
}

var (
	secretName   = words("apikey", "auth", "credential", "credentials", "key", "password", "pword", "passwd", "secret", "token")
	harmlessName = words("public", "file", "version")
)

// words matches names that hold one of the words between underscores.
func words(list ...string) *regexp.Regexp {
	return regexp.MustCompile(`(?i)(?:_|^)(?:` + strings.Join(list, "|") + `)(?:_|$)`)
}

// lintSecretName warns of names that look like secrets, which images would keep.
func (st *step) lintSecretName(instruction, name string) {
	if secretName.MatchString(name) && !harmlessName.MatchString(name) {
		rule := &linter.RuleSecretsUsedInArgOrEnv
		st.lint.Run(rule, st.command.Location(), rule.Format(instruction, name))
	}
}

// onlyOnce remembers an instruction of which only the last counts.
type onlyOnce struct {
	seen  bool
	where []parser.Range
}

// lintOnce warns of the earlier instruction, which doesn't count.
func (st *step) lintOnce(cmd instructions.Command, o *onlyOnce) {
	if o.seen {
		rule := &linter.RuleMultipleInstructionsDisallowed
		st.lint.Run(rule, o.where, rule.Format(cmd.Name()))
	}
	o.seen, o.where = true, cmd.Location()
}

// lintIgnored warns of a path that the ignore file leaves out. Where that file
// has exceptions, it can't be told.
func (t *transfer) lintIgnored(src string) error {
	if t.ignored == nil || t.ignored.Exclusions() {
		return nil
	}
	src = path.Clean(src)
	if (src == "." || src == "/") && !ignoresAll(t.ignored) {
		return nil
	}
	ignored, err := t.ignored.MatchesOrParentMatches(src)
	if err != nil {
		return err
	}
	if ignored {
		rule := &linter.RuleCopyIgnoredFile
		t.lint.Run(rule, t.command.Location(), rule.Format(t.name[:1]+strings.ToLower(t.name[1:]), src))
	}
	return nil
}

func ignoresAll(m *patternmatcher.PatternMatcher) bool {
	for _, p := range m.Patterns() {
		switch p.String() {
		case "*", "**", "**/*":
			return true
		}
	}
	return false
}
