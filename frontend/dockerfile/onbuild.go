package dockerfile

import (
	"errors"
	"slices"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
)

// addTriggers puts the ONBUILD instructions of the base, an image or a stage,
// before those of s. It tells whether they use other stages, which then must be
// resolved.
func (c *conversion) addTriggers(s *stage) (more bool, _ error) {
	if s.triggered || s.external || s.context != nil {
		return false, nil
	}
	s.triggered = true
	triggers := slices.Clone(s.image.Config.OnBuild)
	s.image.Config.OnBuild = nil
	if s.base != nil {
		for _, cmd := range s.base.src.Commands {
			if on, ok := cmd.(*instructions.OnbuildCommand); ok {
				triggers = append(triggers, on.Expression)
			}
		}
	}
	var commands []command
	for _, text := range triggers {
		cmd, err := parseTrigger(text, s.src.Location)
		if err != nil {
			return false, err
		}
		linked, err := c.newCommand(s, cmd)
		if err != nil {
			return false, err
		}
		linked.trigger = true
		commands = append(commands, linked)
		more = more || len(linked.from) > 0
	}
	if more {
		if err := c.checkCircles(); err != nil {
			return false, err
		}
	}
	s.commands = append(commands, s.commands...)
	s.stepsTotal += len(commands)
	return more, nil
}

// parseTrigger parses one ONBUILD instruction as if it stood at location.
func parseTrigger(text string, location []parser.Range) (instructions.Command, error) {
	file, err := parser.Parse(strings.NewReader(text))
	if err != nil {
		return nil, err
	}
	if len(file.AST.Children) != 1 {
		return nil, errors.New("onbuild trigger should be a single expression")
	}
	node := file.AST.Children[0]
	node.StartLine, node.EndLine = lines(location)
	return instructions.ParseCommand(node)
}

// lines returns the first and last line of ranges.
func lines(ranges []parser.Range) (first, last int) {
	for i, r := range ranges {
		if i == 0 || r.Start.Line < first {
			first = r.Start.Line
		}
		last = max(last, r.End.Line)
	}
	return first, last
}
