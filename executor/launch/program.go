//go:build linux && (amd64 || arm64)

package launch

import (
	"errors"
	"fmt"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A step is one system call of a program. The interpreter in assembly knows
// this layout.
type step struct {
	nr       uintptr
	args     [6]uintptr
	tolerate uint64  // bit n: errno n is fine, go on with the next step
	next     uintptr // bytes to the step that follows on success
	store    uintptr // address of a word that receives the result, or 0
	mustZero uintptr // 1: a result above zero fails, too
	result   int64   // what the system call returned; notRun before that
	ticks    uint64  // time stamp counter after the call
}

const (
	stepSize = unsafe.Sizeof(step{})
	notRun   = -1 << 63
)

// outcome is shared with the child. The interpreter knows this layout.
type outcome struct {
	failed uintptr // address of the step that failed, or 0
	start  uint64  // time stamp counter when the child started
	pidfd  int32   // written by the kernel at clone
	second int32   // pid of the process that Refork makes, written by the kernel
}

// cloneArgs is struct clone_args of clone3, version 2.
type cloneArgs struct {
	flags, pidfd uint64
	_, parentTID uint64 // child_tid
	exitSignal   uint64
	_, _         uint64 // stack, stack_size: the child needs none
	_, _, _      uint64 // tls, set_tid, set_tid_size
	cgroup       uint64
}

// Program is a list of system calls for a child to do, the last being an
// execve. Build it with its methods and launch it once. Pointers in arguments must come from
// its own methods, which keep the memory alive and in place.
type Program struct {
	steps []step
	names []name // parallel to steps
	stage string
	links []link

	chunk []byte   // free rest of the last chunk
	keep  [][]byte // all chunks; Go's collector does not move heap memory
	out   *outcome
	args  *cloneArgs
	again *cloneArgs // of Refork
}

// name is what a step is called in errors.
type name struct{ stage, what string }

// usualSteps is what a container takes: about 150.
const usualSteps = 192

// link: the result of step from is argument arg of step to.
type link struct{ from, to, arg int }

// Step is a handle on a step just added, for refining it.
type Step struct {
	p *Program
	i int
}

// Stage names what the steps added from now on are for; errors carry it.
func (p *Program) Stage(name string) { p.stage = name }

// Call adds the system call nr with args. what says in errors what it is on.
func (p *Program) Call(what string, nr uintptr, args ...uintptr) Step {
	s := step{nr: nr, next: stepSize, result: notRun}
	copy(s.args[:], args)
	if p.steps == nil {
		p.steps, p.names = make([]step, 0, usualSteps), make([]name, 0, usualSteps)
	}
	p.steps = append(p.steps, s)
	p.names = append(p.names, name{p.stage, what})
	return Step{p, len(p.steps) - 1}
}

// Tolerate makes the program go on with the following step after these errors.
// Their numbers must be below 64.
func (s Step) Tolerate(errnos ...unix.Errno) Step {
	for _, e := range errnos {
		if e >= 64 {
			panic(fmt.Sprintf("internal error: errno %d is not in the range that steps can tolerate", e))
		}
		s.p.steps[s.i].tolerate |= 1 << e
	}
	return s
}

// Skip makes the program leave out the n following steps if this one succeeds.
func (s Step) Skip(n int) Step {
	s.p.steps[s.i].next = stepSize * uintptr(1+n)
	return s
}

// MustBeZero makes a positive result a failure.
func (s Step) MustBeZero() Step {
	s.p.steps[s.i].mustZero = 1
	return s
}

// Into makes the result, such as a file descriptor, argument arg of a later
// step. Each step can feed one other.
func (s Step) Into(to Step, arg int) {
	s.p.links = append(s.p.links, link{s.i, to.i, arg})
}

// Ran says whether the step succeeded; it is meaningful after Launch.
func (s Step) Ran() bool { r := s.p.steps[s.i].result; return r >= 0 }

// alloc returns n bytes, aligned for any struct, that live as long as p.
func (p *Program) alloc(n int) []byte {
	n = (n + 7) &^ 7
	if n > len(p.chunk) {
		p.chunk = make([]byte, max(n, 8<<10))
		p.keep = append(p.keep, p.chunk)
	}
	b := p.chunk[:n:n]
	p.chunk = p.chunk[n:]
	return b
}

// String copies s into the program, terminated by a zero byte. A zero byte
// within s would cut it short; Checking the text is the caller's task.
func (p *Program) String(s string) uintptr {
	b := p.alloc(len(s) + 1)
	copy(b, s)
	return uintptr(unsafe.Pointer(&b[0]))
}

// Bytes copies b into the program.
func (p *Program) Bytes(b []byte) uintptr {
	c := p.alloc(max(len(b), 1))
	copy(c, b)
	return uintptr(unsafe.Pointer(&c[0]))
}

// Room is n bytes for a system call of the child to write to; they can be read
// after Launch.
func (p *Program) Room(n int) ([]byte, uintptr) {
	b := p.alloc(n)
	return b[:n], uintptr(unsafe.Pointer(&b[0]))
}

// Words copies w into the program: structs made of 64-bit fields or pointers.
func (p *Program) Words(w ...uintptr) uintptr {
	if len(w) == 0 {
		return p.Bytes(nil)
	}
	return p.Bytes(unsafe.Slice((*byte)(unsafe.Pointer(&w[0])), len(w)*int(unsafe.Sizeof(w[0]))))
}

// Strings copies a list of strings as argv and envp want it.
func (p *Program) Strings(list []string) uintptr {
	ptrs := make([]uintptr, len(list)+1)
	for i, s := range list {
		ptrs[i] = p.String(s)
	}
	return p.Words(ptrs...)
}

// assemble makes the program ready to run: steps don't move from here on.
func (p *Program) assemble() {
	p.end()
	p.out = &outcome{pidfd: -1}
	p.link()
}

// end marks the end of the steps. Nothing can follow the last execve: reaching
// this step is a failure.
func (p *Program) end() {
	p.Stage("")
	p.Call("", ^uintptr(0))
}

// link makes steps feed others, where they now are in memory.
func (p *Program) link() {
	for _, l := range p.links {
		p.steps[l.from].store = uintptr(unsafe.Pointer(&p.steps[l.to].args[l.arg]))
	}
}

// StepError is a system call of a program that failed.
type StepError struct {
	Stage string // such as "mount"
	What  string // such as "/proc"
	Errno unix.Errno
}

func (e *StepError) Error() string {
	if e.What == "" {
		return fmt.Sprintf("%s: %v", e.Stage, e.Errno)
	}
	return fmt.Sprintf("%s %s: %v", e.Stage, e.What, e.Errno)
}

func (e *StepError) Unwrap() error { return e.Errno }

// ErrNotExecuted: the program ran to its end, but none of its execve steps,
// all of which tolerate errors, succeeded.
var ErrNotExecuted = errors.New("no execve step succeeded")

// err says after a run what failed; nil if nothing did.
func (p *Program) err() error {
	if p.out.failed == 0 {
		return nil
	}
	i := int((p.out.failed - uintptr(unsafe.Pointer(&p.steps[0]))) / stepSize)
	if i == len(p.steps)-1 {
		return ErrNotExecuted
	}
	errno := unix.Errno(-p.steps[i].result)
	if p.steps[i].result > 0 {
		errno = unix.ESRCH
	}
	return &StepError{Stage: p.names[i].stage, What: p.names[i].what, Errno: errno}
}

// Results returns the errors of all steps of a stage that ran, in order; those
// that succeeded are 0.
func (p *Program) Results(stage string) []unix.Errno {
	var errs []unix.Errno
	for i, s := range p.steps {
		if p.names[i].stage != stage || s.result == notRun {
			continue
		}
		errs = append(errs, unix.Errno(max(0, -s.result)))
	}
	return errs
}

// StageTime is how many ticks of the processor's time stamp counter a stage
// took.
type StageTime struct {
	Stage string
	Steps int
	Ticks uint64
}

// Times tells where a launch spent its time, in order of the stages.
func (p *Program) Times() []StageTime {
	var times []StageTime
	last := p.out.start
	for i, s := range p.steps {
		if s.result == notRun {
			continue
		}
		j := slices.IndexFunc(times, func(t StageTime) bool { return t.Stage == p.names[i].stage })
		if j < 0 {
			j = len(times)
			times = append(times, StageTime{Stage: p.names[i].stage})
		}
		times[j].Steps++
		times[j].Ticks += s.ticks - last
		last = s.ticks
	}
	return times
}
