package cache

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// What a process goes on to write to after a crash, or an orderly end that left
// it, is taken up by the next manager, with what was written meanwhile.
func TestAdopt(t *testing.T) {
	for name, end := range map[string]func(t *testing.T, e *env, u *Mutable){
		"after a crash": func(_ *testing.T, e *env, _ *Mutable) { e.crash() },
		"after an end": func(t *testing.T, e *env, u *Mutable) {
			must(t, u.Leave(t.Context()))
			must(t, e.m.Close()) // without e.close: what was left is in no account
			e.down()
			e.open()
		},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			base := e.layer(nil, Options{Description: "base"}, "f=1")
			e.persist(base)
			u := get(e.m.New(t.Context(), base, Options{Description: "step"}))(t)
			e.write(u, "g=2")
			i := u.Interrupted()
			base.Release()
			e.adopt = []Interrupted{i, i, {Snapshot: "nosuch"}}
			end(t, e, u)
			e.adopt = nil
			must(t, os.WriteFile(filepath.Join(e.root, "snapshots", i.Snapshot, "fs", "h"), []byte("3"), 0o644))

			u = get(e.m.Adopted(i))(t)
			if _, err := e.m.Adopted(i); !errors.Is(err, ErrNotFound) {
				t.Errorf("a second handle: %v", err)
			}
			if _, err := e.m.Adopted(Interrupted{Snapshot: "nosuch"}); !errors.Is(err, ErrNotFound) {
				t.Errorf("what isn't there: %v", err)
			}
			ref := get(u.Commit(t.Context()))(t)
			e.wantFiles(ref, "f=1", "g=2", "h=3")
			e.persist(ref)
			ref.Release()
			e.restart()
		})
	}
}

// What stands on a record that is gone, or has been committed meanwhile, isn't
// taken up, and what nobody takes up is swept.
func TestAdoptInVain(t *testing.T) {
	e := newEnv(t)
	base := e.layer(nil, Options{Description: "base"}, "f=1") // never persisted
	onLost := get(e.m.New(t.Context(), base, Options{}))(t).Interrupted()
	done := get(e.m.New(t.Context(), nil, Options{}))(t)
	committed := done.Interrupted()
	ref := get(done.Commit(t.Context()))(t)
	e.persist(ref)
	swept := get(e.m.New(t.Context(), nil, Options{}))(t).Interrupted()
	e.adopt = []Interrupted{onLost, committed}
	e.crash()
	e.adopt = nil
	for _, i := range []Interrupted{onLost, committed, swept} {
		if _, err := e.m.Adopted(i); !errors.Is(err, ErrNotFound) {
			t.Errorf("%+v: %v", i, err)
		}
	}
	e.cleared()
	for _, i := range []Interrupted{onLost, swept} {
		if _, err := os.Stat(filepath.Join(e.root, "snapshots", i.Snapshot)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there: %v", i.Snapshot, err)
		}
	}
}
