// Package cleanup undoes acquisitions in reverse order.
package cleanup

import (
	"errors"
	"slices"
)

// Stack holds the undo functions of what has been acquired so far. The zero
// value is ready to use. It is not safe for concurrent use.
type Stack struct {
	funcs []func() error
}

// Add registers fn to be run before everything added earlier.
func (s *Stack) Add(fn func() error) { s.funcs = append(s.funcs, fn) }

// AddFunc is Add for a function that cannot fail.
func (s *Stack) AddFunc(fn func()) { s.Add(func() error { fn(); return nil }) }

// Run calls the registered functions, last first, each exactly once, and
// returns their errors joined. Afterwards the stack is empty.
func (s *Stack) Run() error {
	funcs := s.funcs
	s.funcs = nil
	var errs []error
	for _, fn := range slices.Backward(funcs) {
		errs = append(errs, fn())
	}
	return errors.Join(errs...)
}

// Keep empties the stack and hands its duty to the returned function, which
// behaves as Run would have. A later Run of the stack does nothing.
func (s *Stack) Keep() func() error {
	kept := &Stack{funcs: s.funcs}
	s.funcs = nil
	return kept.Run
}
