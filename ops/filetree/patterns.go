package filetree

import (
	"fmt"

	"github.com/moby/patternmatcher"
)

// patterns are what below the source is copied (LLB-074).
type patterns struct {
	include, exclude *patternmatcher.PatternMatcher
}

// patternInfo is what is known of a directory's match when those of what is
// in it are asked for.
type patternInfo struct{ include, exclude patternmatcher.MatchInfo }

func newPatterns(c *Copy) (p patterns, err error) {
	if len(c.Include) > 0 {
		if p.include, err = patternmatcher.New(c.Include); err != nil {
			return p, fmt.Errorf("include patterns %q: %w", c.Include, err)
		}
	}
	if len(c.Exclude) > 0 {
		if p.exclude, err = patternmatcher.New(c.Exclude); err != nil {
			return p, fmt.Errorf("exclude patterns %q: %w", c.Exclude, err)
		}
	}
	return p, nil
}

func (p patterns) none() bool { return p.include == nil && p.exclude == nil }

// match reports whether rel is copied and, if not, whether something below it
// may be.
func (p patterns) match(rel string, parent patternInfo) (copied, below bool, info patternInfo, err error) {
	copied, below = true, true
	if p.include != nil {
		if copied, info.include, err = p.include.MatchesUsingParentResults(rel, parent.include); err != nil {
			return false, false, info, fmt.Errorf("match %q against include patterns: %w", rel, err)
		}
	}
	if p.exclude != nil {
		var excluded bool
		if excluded, info.exclude, err = p.exclude.MatchesUsingParentResults(rel, parent.exclude); err != nil {
			return false, false, info, fmt.Errorf("match %q against exclude patterns: %w", rel, err)
		}
		if excluded {
			copied, below = false, p.exclude.Exclusions()
		}
	}
	return copied, below, info, nil
}
