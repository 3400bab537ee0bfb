package policy

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	spb "github.com/moby/buildkit/sourcepolicy/pb"
)

// matcher is a selector's identifier. A pattern of nil matches by equality only,
// which the rule sees to.
type matcher struct{ pattern *regexp.Regexp }

func newMatcher(sel *spb.Selector) (m matcher, err error) {
	switch sel.MatchType {
	case spb.MatchType_EXACT:
		return m, nil
	case spb.MatchType_REGEX:
		m.pattern, err = regexp.Compile(sel.Identifier)
		return m, err
	case spb.MatchType_WILDCARD:
		if strings.Contains(sel.Identifier, "**") {
			return m, errors.New(`"**" is no wildcard; a "*" stands for any text`)
		}
		m.pattern, err = regexp.Compile("^" + strings.ReplaceAll(regexp.QuoteMeta(sel.Identifier), `\*`, "(.*)") + "$")
		return m, err
	}
	return m, fmt.Errorf("unknown match type %d", sel.MatchType)
}

func (m matcher) matches(id string) bool { return m.pattern != nil && m.pattern.MatchString(id) }

// expand is to with what id's groups are in place of $1 or ${1}. A pattern that
// matches a part of id leaves the rest.
func (m matcher) expand(id, to string) string {
	switch {
	case m.pattern == nil:
		return to
	case !m.pattern.MatchString(id): // it is equal to the selector all the same
		return id
	}
	return m.pattern.ReplaceAllString(id, to)
}

// constraint is what an attribute of a source must be.
type constraint struct {
	key, value string
	condition  spb.AttrMatch
	pattern    *regexp.Regexp // of MATCHES
}

func newConstraint(in *spb.AttrConstraint) (c constraint, err error) {
	if in == nil {
		return c, errors.New("a constraint is missing")
	}
	c = constraint{key: in.Key, value: in.Value, condition: in.Condition}
	switch in.Condition {
	case spb.AttrMatch_EQUAL, spb.AttrMatch_NOTEQUAL:
	case spb.AttrMatch_MATCHES:
		if c.pattern, err = regexp.Compile(in.Value); err != nil {
			return c, fmt.Errorf("constraint of %s: %w", in.Key, err)
		}
	default:
		return c, fmt.Errorf("constraint of %s: unknown condition %d", in.Key, in.Condition)
	}
	return c, nil
}

// holds takes an attribute that isn't there for an empty one.
func (c constraint) holds(attrs map[string]string) bool {
	switch c.condition {
	case spb.AttrMatch_EQUAL:
		return attrs[c.key] == c.value
	case spb.AttrMatch_NOTEQUAL:
		return attrs[c.key] != c.value
	}
	return c.pattern.MatchString(attrs[c.key])
}
