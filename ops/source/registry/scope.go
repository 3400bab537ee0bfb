package registry

import (
	"maps"
	"slices"
	"strings"
)

// scopes is a set of what tokens allow: resource ("repository:a/b") to actions.
// See https://distribution.github.io/distribution/spec/auth/scope.
type scopes map[string]map[string]bool

// parseScopes reads scopes, each of which may be several separated by spaces.
func parseScopes(list ...string) scopes {
	s := scopes{}
	for _, item := range list {
		for _, one := range strings.Fields(item) {
			resource, actions := one, ""
			// The name may hold a colon, as in host:port/name.
			if i := strings.LastIndexByte(one, ':'); i >= 0 && strings.IndexByte(one, ':') != i {
				resource, actions = one[:i], one[i+1:]
			}
			if s[resource] == nil {
				s[resource] = map[string]bool{}
			}
			for a := range strings.SplitSeq(actions, ",") {
				if a != "" {
					s[resource][a] = true
				}
			}
		}
	}
	return s
}

// list returns the scopes in their one normal form: sorted, each resource once.
func (s scopes) list() []string {
	var out []string
	for _, resource := range slices.Sorted(maps.Keys(s)) {
		actions := slices.Sorted(maps.Keys(s[resource]))
		if len(actions) == 0 {
			out = append(out, resource)
			continue
		}
		out = append(out, resource+":"+strings.Join(actions, ","))
	}
	return out
}

// contains tells whether s allows everything that sub does.
func (s scopes) contains(sub scopes) bool {
	for resource, actions := range sub {
		have, ok := s[resource]
		if !ok {
			return false
		}
		for a := range actions {
			if !have[a] {
				return false
			}
		}
	}
	return true
}
