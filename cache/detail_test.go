package cache

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestDetails(t *testing.T) {
	e := newEnv(t)
	now := time.Now()
	old := now.Add(-time.Hour)
	base := e.aged(nil, "base", 64, old, 1, Options{})
	ref := get(e.m.Get(t.Context(), base))(t)
	var children []string
	for i := range namedUsers + 2 {
		children = append(children, e.aged(ref, fmt.Sprint("child", i), 1, now, 1, Options{}))
	}
	ref.Release()
	e.m.mu.Lock()
	e.m.records[base].lastUsed = old
	e.m.mu.Unlock()
	internal := e.aged(nil, "internal", 1, old, 1, Options{Type: TypeInternal})
	git := e.aged(nil, "git", 8, old, 1, Options{Type: TypeGit})
	fresh := e.aged(nil, "fresh", 8, now, 1, Options{Type: TypeGit})
	mount := get(e.m.New(t.Context(), nil, Options{Type: TypeCacheMount, Retain: true, Index: map[string]string{"cachemount.id": "go"}}))(t)
	must(t, mount.Release(t.Context()))
	held := get(e.m.New(t.Context(), nil, Options{Description: "held"}))(t)

	rules := []PruneOptions{
		{Rule: "git", Filters: []string{"type==source.git.checkout"}, KeepDuration: time.Minute},
		{Rule: "big", MaxUsedSpace: 1 << 40},
		{Rule: "small", All: true, Filters: []string{"type==regular", "type==internal"}, ReservedSpace: 1},
	}
	got := map[string]Detail{}
	for _, d := range get(e.m.Details(t.Context(), nil, rules))(t) {
		got[d.ID] = d
	}
	var below []string
	for _, id := range children {
		below = append(below, "record "+id)
	}
	for name, tc := range map[string]struct {
		id    string
		users []string
		rule  string
		due   bool
	}{
		"base":          {base, nil, "small", true},
		"of no rule":    {mount.ID(), []string{"kept for its next use"}, "big", false},
		"internal":      {internal, []string{"kept as a step's result"}, "small", true},
		"by age":        {git, []string{"kept as a step's result"}, "git", true},
		"too young":     {fresh, []string{"kept as a step's result"}, "git", false},
		"being written": {held.ID(), []string{"what runs now"}, "big", false},
	} {
		d := got[tc.id]
		if tc.users != nil && !slices.Equal(d.Users, tc.users) || d.Rule != tc.rule || d.Due != tc.due {
			t.Errorf("%s: users %q, rule %q, due %t", name, d.Users, d.Rule, d.Due)
		}
	}
	users := got[base].Users
	if len(users) != namedUsers+2 || users[namedUsers] != "2 more records" || !slices.Contains(below, users[0]) {
		t.Errorf("users of the base: %q", users)
	}
	if some := get(e.m.Details(t.Context(), []string{"cachemount.id==go"}, rules))(t); len(some) != 1 || some[0].ID != mount.ID() {
		t.Errorf("by the id of a cache mount: %+v", some)
	}
	if _, err := e.m.Details(t.Context(), []string{"=="}, nil); err == nil {
		t.Error("a filter that can't be parsed was accepted")
	}
	if _, err := e.m.Details(t.Context(), nil, []PruneOptions{{Rule: "bad", Filters: []string{"=="}}}); err == nil || !strings.Contains(err.Error(), "bad") {
		t.Errorf("a rule that can't be parsed: %v", err)
	}
	if got := e.prune(PruneOptions{Filters: []string{"cachemount.id==go"}}); len(got) != 1 {
		t.Errorf("pruned %q", got)
	}
	must(t, held.Release(t.Context()))
}
