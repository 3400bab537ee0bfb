package cache

import (
	"testing"

	"github.com/kilnbuild/kiln/internal/store"
)

// A record that couldn't be added to a batch, and that another batch relied on
// meanwhile, is tried again, so that what needs it is there after a restart.
func TestPersistFailsBelowAnotherRecord(t *testing.T) {
	e := newEnv(t)
	parent := e.layer(nil, Options{}, "a=1")
	child := e.layer(parent, Options{}, "b=1")
	s := &script{left: 1, then: func(op string) error {
		e.persist(child) // by another build
		return injected(op)
	}}
	s.install(e)
	wantErr(t, parent.Persist(&store.Batch{}), errFault)
	if s.hit != "persist" {
		t.Fatalf("the fault was in %q", s.hit)
	}
	ids := []string{parent.ID(), child.ID()}
	parent.Release()
	child.Release()
	e.crash()
	for _, id := range ids {
		get(e.m.Get(t.Context(), id))(t).Release()
	}
}

// One that nobody relied on goes with its last handle.
func TestPersistFails(t *testing.T) {
	e := newEnv(t)
	base := e.layer(nil, Options{}, "a=1")
	top := e.layer(base, Options{}, "b=1")
	(&script{left: 2, then: injected}).install(e)
	wantErr(t, top.Persist(&store.Batch{}), errFault)
	base.Release()
	top.Release()
	e.empty()
}
