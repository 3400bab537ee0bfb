// Package policy evaluates source policies (LLB-120, -121): rules by which a
// client, or a frontend, allows sources, denies them, or has others stand in for
// them. Whom else to ask about a source isn't its business.
package policy

import (
	"errors"
	"fmt"

	"github.com/moby/buildkit/solver/pb"
	spb "github.com/moby/buildkit/sourcepolicy/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// maxConversions bounds how often one source may be converted: rules may form a
// circle.
const maxConversions = 20

// Rules are those of several policies, in order. Their methods are safe for
// concurrent use.
type Rules struct{ policies [][]rule }

type rule struct {
	action   spb.PolicyAction
	match    matcher
	attrs    []constraint
	identity string      // of the selector
	updates  *spb.Update // of a conversion
}

// New checks policies, of which nil ones have no rules.
func New(policies ...*spb.Policy) (*Rules, error) {
	r := &Rules{}
	for _, p := range policies {
		rules := make([]rule, len(p.GetRules()))
		for i, in := range p.GetRules() {
			var err error
			if rules[i], err = newRule(in); err != nil {
				return nil, fmt.Errorf("rule %d: %w", i, err)
			}
		}
		if len(rules) > 0 {
			r.policies = append(r.policies, rules)
		}
	}
	return r, nil
}

func newRule(in *spb.Rule) (r rule, err error) {
	sel := in.GetSelector()
	switch {
	case in == nil:
		return r, errors.New("it is missing")
	case sel == nil:
		return r, errors.New("it has no selector")
	case in.Action != spb.PolicyAction_ALLOW && in.Action != spb.PolicyAction_DENY && in.Action != spb.PolicyAction_CONVERT:
		return r, fmt.Errorf("unknown action %d", in.Action)
	case in.Action == spb.PolicyAction_CONVERT && in.Updates == nil:
		return r, errors.New("it converts to nothing: updates are missing")
	}
	r = rule{action: in.Action, identity: sel.Identifier, updates: in.Updates}
	if r.match, err = newMatcher(sel); err != nil {
		return r, fmt.Errorf("selector %q: %w", sel.Identifier, err)
	}
	for _, c := range sel.Constraints {
		constraint, err := newConstraint(c)
		if err != nil {
			return r, fmt.Errorf("selector %q: %w", sel.Identifier, err)
		}
		r.attrs = append(r.attrs, constraint)
	}
	return r, nil
}

// Empty reports whether there are no rules.
func (r *Rules) Empty() bool { return len(r.policies) == 0 }

// DeniedError says that a rule denies a source.
type DeniedError struct{ Identifier string }

func (e *DeniedError) Error() string { return fmt.Sprintf("source %q denied by policy", e.Identifier) }

// GRPCStatus gives the error its code on the wire.
func (e *DeniedError) GRPCStatus() *status.Status {
	return status.New(codes.PermissionDenied, e.Error())
}

// Apply converts src until no rule converts it any more, and reports whether it
// has changed. The error is a *DeniedError if it is denied. In each policy a later
// rule prevails over an earlier one; what one policy denies no other allows.
func (r *Rules) Apply(src *pb.SourceOp) (changed bool, err error) {
	for range maxConversions + 1 {
		converted, err := r.once(src)
		if err != nil || !converted {
			return changed, err
		}
		changed = true
	}
	return changed, fmt.Errorf("source %q is converted by policy more than %d times; do the rules form a circle?", src.Identifier, maxConversions)
}

// once goes through the policies up to the first rule that converts src.
func (r *Rules) once(src *pb.SourceOp) (converted bool, err error) {
	for _, rules := range r.policies {
		deny := false
		for i := range rules {
			rule := &rules[i]
			if !rule.matches(src) {
				continue
			}
			if rule.action == spb.PolicyAction_CONVERT && rule.convert(src) {
				return true, nil
			}
			deny = rule.action == spb.PolicyAction_DENY || deny && rule.action != spb.PolicyAction_ALLOW
		}
		if deny {
			return false, &DeniedError{src.Identifier}
		}
	}
	return false, nil
}

func (r *rule) matches(src *pb.SourceOp) bool {
	for _, c := range r.attrs {
		if !c.holds(src.Attrs) {
			return false
		}
	}
	return src.Identifier == r.identity || r.match.matches(src.Identifier)
}

// convert reports whether it changes src. Without an identifier to convert to,
// src keeps its own: upstream gives it the selector's, which for a pattern names
// nothing.
func (r *rule) convert(src *pb.SourceOp) (changed bool) {
	if to := r.updates.Identifier; to != "" {
		to = r.match.expand(src.Identifier, to)
		changed, src.Identifier = to != src.Identifier, to
	}
	for k, v := range r.updates.Attrs {
		if src.Attrs[k] == v {
			continue
		}
		if src.Attrs == nil {
			src.Attrs = map[string]string{}
		}
		src.Attrs[k], changed = v, true
	}
	return changed
}
