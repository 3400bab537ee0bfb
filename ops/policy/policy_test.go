package policy

import (
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"

	"github.com/moby/buildkit/solver/pb"
	spb "github.com/moby/buildkit/sourcepolicy/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

type attrs = map[string]string

func on(action spb.PolicyAction, id string, match spb.MatchType, constraints ...*spb.AttrConstraint) *spb.Rule {
	return &spb.Rule{Action: action, Selector: &spb.Selector{Identifier: id, MatchType: match, Constraints: constraints}}
}

func allow(id string) *spb.Rule { return on(spb.PolicyAction_ALLOW, id, spb.MatchType_WILDCARD) }
func deny(id string) *spb.Rule  { return on(spb.PolicyAction_DENY, id, spb.MatchType_WILDCARD) }

func convert(match spb.MatchType, id, to string, set attrs) *spb.Rule {
	r := on(spb.PolicyAction_CONVERT, id, match)
	r.Updates = &spb.Update{Identifier: to, Attrs: set}
	return r
}

func when(r *spb.Rule, key string, condition spb.AttrMatch, value string) *spb.Rule {
	r.Selector.Constraints = append(r.Selector.Constraints, &spb.AttrConstraint{Key: key, Value: value, Condition: condition})
	return r
}

const (
	wildcard = spb.MatchType_WILDCARD
	exact    = spb.MatchType_EXACT
	regex    = spb.MatchType_REGEX
)

// compat: LLB-120, LLB-121
func TestApply(t *testing.T) {
	type policies = [][]*spb.Rule
	one := func(rules ...*spb.Rule) policies { return policies{rules} }
	for _, c := range []struct {
		name     string
		policies policies
		in       string
		attrs    attrs
		want     string // "" is denied
		set      attrs
	}{
		{"nothing", nil, "git://a", nil, "git://a", nil},
		{"a rule for others", one(deny("git://b")), "git://a", nil, "git://a", nil},
		{"deny", one(deny("git://a")), "git://a", nil, "", nil},
		{"deny by wildcard", one(deny("git://*")), "git://a", nil, "", nil},
		{"a wildcard is anchored", one(deny("a*b")), "xaby", nil, "xaby", nil},
		{"a wildcard's other characters are themselves", one(deny("git://a.c*")), "git://abc", nil, "git://abc", nil},
		{"later allows", one(deny("*"), allow("git://a")), "git://a", nil, "git://a", nil},
		{"later denies", one(allow("*"), deny("git://a")), "git://a", nil, "", nil},
		{"no other policy allows", policies{{deny("*")}, {allow("*")}}, "git://a", nil, "", nil},
		{"a second policy denies", policies{{allow("*")}, {deny("*")}}, "git://a", nil, "", nil},
		{"exact is no wildcard", one(on(spb.PolicyAction_DENY, "git://*", exact)), "git://a", nil, "git://a", nil},
		{"exact", one(on(spb.PolicyAction_DENY, "git://a", exact)), "git://a", nil, "", nil},
		{"regex anywhere", one(on(spb.PolicyAction_DENY, "[ab]$", regex)), "git://a", nil, "", nil},
		{"regex that is equal", one(on(spb.PolicyAction_DENY, "git://a+", regex)), "git://a+", nil, "", nil},

		{"convert", one(convert(wildcard, "git://a", "git://b", nil)), "git://a", nil, "git://b", nil},
		{"convert by wildcard", one(convert(wildcard, "docker-image://docker.io/library/*:*", "docker-image://mirror/$1:${2}-slim", nil)),
			"docker-image://docker.io/library/go:1", nil, "docker-image://mirror/go:1-slim", nil},
		{"convert by regex", one(convert(regex, `^git://(?P<host>h)/(.*)$`, "git://x/$host/${2}", nil)), "git://h/r", nil, "git://x/h/r", nil},
		{"regex of a part", one(convert(regex, "alpha", "beta", nil)), "git://alpha/alpha", nil, "git://beta/beta", nil},
		{"exact has no groups", one(convert(exact, "git://a", "git://$1", nil)), "git://a", nil, "git://$1", nil},
		{"attributes", one(convert(exact, "git://a", "", attrs{"k": "v", "l": ""})), "git://a", attrs{"o": "p"}, "git://a", attrs{"o": "p", "k": "v"}},
		{"attributes by wildcard", one(convert(wildcard, "git://*", "", attrs{"k": "v"})), "git://a", nil, "git://a", attrs{"k": "v"}},
		{"converted again", one(convert(exact, "a://1", "a://2", nil), convert(exact, "a://2", "a://3", nil)), "a://1", nil, "a://3", nil},
		{"converted, then denied", one(convert(exact, "a://1", "a://2", nil), deny("a://2")), "a://1", nil, "", nil},
		{"converted, so not denied", one(deny("a://1"), convert(exact, "a://1", "a://2", nil)), "a://1", nil, "a://2", nil},
		{"converted to itself, and denied", one(deny("a://1"), convert(exact, "a://1", "a://1", nil)), "a://1", nil, "", nil},
		{"converted for a later policy", policies{{convert(exact, "a://1", "a://2", nil)}, {deny("a://2")}}, "a://1", nil, "", nil},
		{"a policy before it denies", policies{{deny("a://1")}, {convert(exact, "a://1", "a://2", nil)}}, "a://1", nil, "", nil},

		{"equal", one(when(deny("*"), "k", spb.AttrMatch_EQUAL, "v")), "a://1", attrs{"k": "v"}, "", nil},
		{"not equal", one(when(deny("*"), "k", spb.AttrMatch_EQUAL, "v")), "a://1", attrs{"k": "w"}, "a://1", attrs{"k": "w"}},
		{"equal to nothing", one(when(deny("*"), "k", spb.AttrMatch_EQUAL, "")), "a://1", nil, "", nil},
		{"NOTEQUAL", one(when(deny("*"), "k", spb.AttrMatch_NOTEQUAL, "v")), "a://1", nil, "", nil},
		{"NOTEQUAL of an equal one", one(when(deny("*"), "k", spb.AttrMatch_NOTEQUAL, "v")), "a://1", attrs{"k": "v"}, "a://1", attrs{"k": "v"}},
		{"MATCHES", one(when(deny("*"), "k", spb.AttrMatch_MATCHES, "^v.$")), "a://1", attrs{"k": "vv"}, "", nil},
		{"all must hold", one(when(when(deny("*"), "k", spb.AttrMatch_EQUAL, "v"), "l", spb.AttrMatch_EQUAL, "v")), "a://1", attrs{"k": "v"}, "a://1", attrs{"k": "v"}},
		{"a constraint holds only with the identifier", one(when(deny("b://*"), "k", spb.AttrMatch_EQUAL, "v")), "a://1", attrs{"k": "v"}, "a://1", attrs{"k": "v"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var all []*spb.Policy
			for _, rules := range c.policies {
				all = append(all, &spb.Policy{Version: 1, Rules: rules})
			}
			r, err := New(all...)
			if err != nil {
				t.Fatal(err)
			}
			src := &pb.SourceOp{Identifier: c.in, Attrs: maps.Clone(c.attrs)}
			changed, err := r.Apply(src)
			if denied := (*DeniedError)(nil); c.want == "" {
				if !errors.As(err, &denied) || status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), denied.Identifier) {
					t.Fatalf("%v, error %v", src, err)
				}
				return
			}
			if err != nil || src.Identifier != c.want || !maps.Equal(src.Attrs, c.set) {
				t.Errorf("%v, error %v; want %s %v", src, err, c.want, c.set)
			}
			if want := c.in != c.want || !maps.Equal(c.attrs, c.set); changed != want {
				t.Errorf("reports a change: %v", changed)
			}
		})
	}
}

// compat: LLB-121
func TestRulesInACircle(t *testing.T) {
	r, err := New(&spb.Policy{Rules: []*spb.Rule{convert(exact, "a://1", "a://2", nil), convert(exact, "a://2", "a://1", nil)}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Apply(&pb.SourceOp{Identifier: "a://1"}); err == nil || !strings.Contains(err.Error(), "more than 20 times") {
		t.Errorf("error %v", err)
	}
	var rules []*spb.Rule
	for i := range 20 {
		rules = append(rules, convert(exact, fmt.Sprintf("a://%d", i), fmt.Sprintf("a://%d", i+1), nil))
	}
	if r, err = New(&spb.Policy{Rules: rules}); err != nil {
		t.Fatal(err)
	}
	src := &pb.SourceOp{Identifier: "a://0"}
	if _, err := r.Apply(src); err != nil || src.Identifier != "a://20" {
		t.Errorf("20 conversions: %v, error %v", src, err)
	}
}

// compat: LLB-120
func TestBadRules(t *testing.T) {
	noUpdates := on(spb.PolicyAction_CONVERT, "a", exact)
	for want, r := range map[string]*spb.Rule{
		"rule 0: it is missing":                 nil,
		"rule 0: it has no selector":            {Action: spb.PolicyAction_DENY},
		"rule 0: unknown action 7":              on(7, "a", exact),
		"updates are missing":                   noUpdates,
		`selector "a": unknown match type 9`:    on(spb.PolicyAction_DENY, "a", 9),
		`selector "(": error parsing regexp`:    on(spb.PolicyAction_DENY, "(", regex),
		`"**" is no wildcard`:                   deny("a/**"),
		"constraint of k: unknown condition 5":  when(deny("a"), "k", 5, ""),
		"constraint of k: error parsing regexp": when(deny("a"), "k", spb.AttrMatch_MATCHES, "["),
		`selector "a": a constraint is missing`: on(spb.PolicyAction_DENY, "a", exact, nil),
	} {
		if _, err := New(nil, &spb.Policy{Rules: []*spb.Rule{r}}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v; want %s", err, want)
		}
	}
	if r, err := New(nil, &spb.Policy{}); err != nil || !r.Empty() {
		t.Errorf("no rules: %v, error %v", r, err)
	}
}

// compat: LLB-121
func TestFull(t *testing.T) {
	for in, want := range map[string]string{
		"docker-image://alpine":              "docker-image://docker.io/library/alpine:latest",
		"docker-image://a/b:c":               "docker-image://docker.io/a/b:c",
		"docker-image://UPPER":               "docker-image://UPPER",
		"git://github.com/a/b.git":           "git://github.com/a/b.git",
		"git://https://me:pw@host/a#ref:dir": "git://host/a#ref:dir",
		"git://git@host:a/b#:dir":            "git://host/a/b#:dir",
		"local://context":                    "local://context",
		"https://host/f?q":                   "https://host/f?q",
		"no scheme":                          "no scheme",
	} {
		if got := Full(in); got != want {
			t.Errorf("%s is %s; want %s", in, got, want)
		}
	}
}
