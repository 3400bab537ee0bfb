// Package seccomp compiles the seccomp profile of an OCI runtime spec to the
// BPF program that the kernel wants.
//
// A filter's cost is paid three times: when it is compiled, when it is
// installed (the kernel translates it and then runs it for every system call
// number to learn which are always allowed), and at calls whose arguments it
// checks. So callers compile once per profile, and the program is a binary
// search over ranges of numbers with the same answer instead of a list of
// comparisons: a few hundred instructions, about ten of which run.
//
// The meaning is runc's with libseccomp: names unknown to an architecture are
// ignored; rules with conditions are tried in order before one without; a
// process of an architecture that the profile doesn't list is killed; a call
// newer than every call the profile knows gets ENOSYS rather than a refusal,
// since programs take that as "use the older call".
package seccomp

import (
	"fmt"
	"maps"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Values of seccomp filters, linux/seccomp.h.
const (
	retKillProcess = 0x80000000
	retKillThread  = 0x00000000
	retTrap        = 0x00030000
	retErrno       = 0x00050000
	retTrace       = 0x7ff00000
	retLog         = 0x7ffc0000
	retAllow       = 0x7fff0000
)

// Offsets in struct seccomp_data.
const (
	offNr   = 0
	offArch = 4
	offArgs = 16
)

// maxInstructions is the kernel's BPF_MAXINSNS.
const maxInstructions = 4096

// Compile translates profile.
func Compile(profile *specs.LinuxSeccomp) ([]unix.SockFilter, error) {
	if nativeArch == "" {
		return nil, fmt.Errorf("no system call table for this architecture")
	}
	for _, a := range profile.Architectures {
		if !slices.Contains(allArchitectures, a) {
			return nil, fmt.Errorf("architecture %q is none that profiles have", a)
		}
	}
	unknown, err := actionValue(profile.DefaultAction, profile.DefaultErrnoRet)
	if err != nil {
		return nil, fmt.Errorf("default action: %w", err)
	}
	prog := block{load(offArch)}
	for _, a := range architectures(profile) {
		spans, err := a.spans(profile, unknown)
		if err != nil {
			return nil, err
		}
		body := block{load(offNr)}
		if a.x32 {
			// Calls of the x32 ABI have the numbers of amd64 and a bit.
			body = append(body, and(^uint32(x32Bit)))
		}
		body = append(body, search(normalize(spans))...)
		prog = append(prog, unless(unix.BPF_JEQ, a.audit, len(body))...)
		prog = append(prog, body...)
	}
	prog = append(prog, ret(retKillProcess))
	if len(prog) > maxInstructions {
		return nil, fmt.Errorf("profile makes %d instructions, the kernel takes at most %d", len(prog), maxInstructions)
	}
	return prog, nil
}

// A span of call numbers from its first up to the next span's has one answer.
type span struct {
	first  uint32
	answer string // key for comparing answers
	code   block
}

// spans lists what profile says for the numbers of a, in no order.
func (a abi) spans(profile *specs.LinuxSeccomp, unknown uint32) ([]span, error) {
	answers, err := rules(profile)
	if err != nil {
		return nil, err
	}
	constant := func(first, value uint32) span {
		return span{first: first, answer: fmt.Sprint(value), code: block{ret(value)}}
	}
	byNr := map[uint32]*answer{}
	last, lastCommon := uint32(0), uint32(0)
	for name, numbers := range a.table() {
		for _, nr := range numbers {
			if r := answers[name]; r != nil {
				byNr[nr] = r
				last = max(last, nr)
				if nr < firstX32Only {
					lastCommon = max(lastCommon, nr)
				}
			}
		}
	}
	spans := []span{constant(0, unknown)}
	for _, nr := range slices.Sorted(maps.Keys(byNr)) {
		code := byNr[nr].code(unknown)
		spans = append(spans, span{first: nr, answer: fmt.Sprint(code), code: code})
		if byNr[nr+1] == nil {
			spans = append(spans, constant(nr+1, unknown))
		}
	}
	if isRefusal(unknown) {
		missing := retErrno | uint32(unix.ENOSYS)
		if a.x32 {
			spans = append(spans, constant(lastCommon+1, missing))
		}
		spans = append(spans, constant(last+1, missing))
	}
	if !a.x32 {
		// Numbers of an ABI on top of this one that isn't listed.
		spans = append(spans, constant(x32Bit, retKillProcess))
	}
	return spans, nil
}

// isRefusal: neither allowed nor already ENOSYS.
func isRefusal(value uint32) bool {
	return value < retTrace && value != retErrno|uint32(unix.ENOSYS) || value == retKillProcess
}

// normalize sorts spans, lets later ones win over earlier ones of the same
// number, and joins neighbours with the same answer.
func normalize(spans []span) []span {
	slices.SortStableFunc(spans, func(a, b span) int { return int(int64(a.first) - int64(b.first)) })
	var out []span
	for _, s := range spans {
		switch n := len(out); {
		case n > 0 && out[n-1].first == s.first:
			out[n-1] = s
		case n > 0 && out[n-1].answer == s.answer:
		default:
			out = append(out, s)
		}
	}
	return slices.CompactFunc(out, func(a, b span) bool { return a.answer == b.answer })
}

// search makes a binary search for the span of the number in A.
func search(spans []span) block {
	if len(spans) == 1 {
		return spans[0].code
	}
	mid := len(spans) / 2
	low := search(spans[:mid])
	prog := unless2(unix.BPF_JGE, spans[mid].first, len(low))
	return append(append(prog, low...), search(spans[mid:])...)
}

// answer is what a profile says about one call.
type answer struct {
	conditional []conditional
	always      *uint32
}

type conditional struct {
	args  []specs.LinuxSeccompArg
	value uint32
}

func (r *answer) code(unknown uint32) block {
	var b block
	if r.always != nil {
		unknown = *r.always
	}
	for _, c := range r.conditional {
		b = append(b, matchAll(c.args, c.value)...)
	}
	return append(b, ret(unknown))
}

// rules collects the answers of profile by system call name.
func rules(profile *specs.LinuxSeccomp) (map[string]*answer, error) {
	answers := map[string]*answer{}
	for _, rule := range profile.Syscalls {
		value, err := actionValue(rule.Action, rule.ErrnoRet)
		if err != nil {
			return nil, fmt.Errorf("rule for %v: %w", rule.Names, err)
		}
		for _, arg := range rule.Args {
			if arg.Index > 5 || operators[arg.Op] == nil {
				return nil, fmt.Errorf("rule for %v: no condition %s on argument %d", rule.Names, arg.Op, arg.Index)
			}
		}
		for _, name := range rule.Names {
			a := answers[name]
			if a == nil {
				a = &answer{}
				answers[name] = a
			}
			switch {
			case len(rule.Args) == 0:
				a.always = &value
			case repeatsArg(rule.Args):
				// Several conditions on one argument are alternatives.
				for _, arg := range rule.Args {
					a.conditional = append(a.conditional, conditional{[]specs.LinuxSeccompArg{arg}, value})
				}
			default:
				a.conditional = append(a.conditional, conditional{rule.Args, value})
			}
		}
	}
	return answers, nil
}

func repeatsArg(args []specs.LinuxSeccompArg) bool {
	seen := map[uint]bool{}
	for _, a := range args {
		if seen[a.Index] {
			return true
		}
		seen[a.Index] = true
	}
	return false
}

func actionValue(action specs.LinuxSeccompAction, errno *uint) (uint32, error) {
	data := uint32(unix.EPERM)
	if errno != nil {
		if *errno > 0xffff {
			return 0, fmt.Errorf("errno %d is out of range", *errno)
		}
		data = uint32(*errno)
	}
	switch action {
	case specs.ActAllow:
		return retAllow, nil
	case specs.ActErrno:
		return retErrno | data, nil
	case specs.ActKill, specs.ActKillThread:
		return retKillThread, nil
	case specs.ActKillProcess:
		return retKillProcess, nil
	case specs.ActTrap:
		return retTrap, nil
	case specs.ActTrace:
		return retTrace | data, nil
	case specs.ActLog:
		return retLog, nil
	}
	if action == specs.ActNotify {
		return 0, fmt.Errorf("action %s: there are no seccomp agents here that could be asked; allow the calls, or refuse them with %s", action, specs.ActErrno)
	}
	return 0, fmt.Errorf("action %q is not supported", action)
}
