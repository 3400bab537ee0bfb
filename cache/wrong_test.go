package cache

import (
	"errors"
	"slices"
	"testing"
)

func TestDistrust(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	base := e.layer(nil, Options{}, "base=1")
	wrong := e.layer(base, Options{}, "wrong=1")
	above := e.layer(wrong, Options{}, "above=1")
	other := e.layer(base, Options{}, "other=1")
	stacked := get(e.m.Merge(ctx, []*Ref{other, above}, Options{}))(t)
	held := e.layer(wrong, Options{}, "held=1")
	e.persist(base, wrong, above, stacked, other, held)
	want := []string{wrong.ID(), above.ID(), stacked.ID(), held.ID()}
	slices.Sort(want)
	id := wrong.ID()
	for _, r := range []*Ref{base, wrong, above, stacked, other} {
		defer func(id string, lost bool) {
			if ref, err := e.m.Get(ctx, id); err == nil {
				ref.Release()
				if lost {
					t.Errorf("record %s is still handed out", id)
				}
			} else if !lost {
				t.Errorf("record %s: %v", id, err)
			}
		}(r.ID(), slices.Contains(want, r.ID()))
		r.Release()
	}

	why := errors.New("files were changed")
	if got := e.m.Distrust([]string{"unknown", id}, why); !slices.Equal(got, want) {
		t.Errorf("took %v out of use, want %v", got, want)
	}
	wantErr(t, second(e.m.Get(ctx, held.ID())), ErrNotFound, why.Error())
	if got := e.m.Distrust([]string{id}, why); len(got) != 0 {
		t.Errorf("took %v out of use twice", got)
	}
	e.wantFiles(held, "base=1", "held=1", "wrong=1") // who holds it isn't disturbed
	held.Release()
	for _, gone := range want {
		wantErr(t, second(e.m.Get(ctx, gone)), ErrNotFound)
	}
	var rules []string
	e.m.Evictions(func(ev Eviction) bool { rules = append(rules, ev.Rule); return true })
	if want := slices.Repeat([]string{"lost: " + why.Error()}, 4); !slices.Equal(rules, want) {
		t.Errorf("the journal has %q, want %q", rules, want)
	}
}

func second[T any](_ T, err error) error { return err }

// A step that writes on top of a wrong record goes on; what it makes is not
// found again.
func TestDistrustWhileWriting(t *testing.T) {
	e := newEnv(t)
	wrong := e.layer(nil, Options{}, "wrong=1")
	u := get(e.m.New(t.Context(), wrong, Options{}))(t)
	e.m.Distrust([]string{wrong.ID()}, errors.New("wrong"))
	e.write(u, "more=1")
	r := get(u.Commit(t.Context()))(t)
	e.wantFiles(r, "more=1", "wrong=1")
	wantErr(t, second(e.m.Get(t.Context(), r.ID())), ErrNotFound)
	wrong.Release()
	r.Release()
}

func TestLocal(t *testing.T) {
	e := newEnv(t)
	src := newSource()
	lazy := e.pull(src, threeLayers(t, src)...)
	local := e.layer(nil, Options{}, "a=1")
	merged := get(e.m.Merge(t.Context(), []*Ref{local, lazy}, Options{}))(t)
	for _, c := range []struct {
		ref  *Ref
		want bool
	}{{nil, true}, {local, true}, {lazy, false}, {merged, false}} {
		if got := c.ref.Local(); got != c.want {
			t.Errorf("local: %v, want %v", got, c.want)
		}
	}
	must(t, lazy.Extract(t.Context()))
	if !lazy.Local() || !merged.Local() {
		t.Error("what was fetched isn't local")
	}
	for _, r := range []*Ref{lazy, local, merged} {
		r.Release()
	}
}
