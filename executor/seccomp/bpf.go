package seccomp

import (
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// A block is code that is entered at its start and either answers or is left
// at its end.
type block []unix.SockFilter

func load(offset uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
}

func and(mask uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: mask}
}

func ret(value uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: value}
}

func jump(n int) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JA, K: uint32(n)}
}

// cmp compares A with k and jumps over jt or jf instructions.
func cmp(op uint16, k uint32, jt, jf int) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_JMP | op | unix.BPF_K, Jt: uint8(jt), Jf: uint8(jf), K: k}
}

// unless jumps over n instructions unless A compares with k.
func unless(op uint16, k uint32, n int) block {
	if n < 256 {
		return block{cmp(op, k, 0, n)}
	}
	return block{cmp(op, k, 1, 0), jump(n)}
}

// unless2 goes on with the next n instructions unless A compares with k, and
// jumps over them if it does.
func unless2(op uint16, k uint32, n int) block {
	if n < 256 {
		return block{cmp(op, k, n, 0)}
	}
	return block{cmp(op, k, 0, 1), jump(n)}
}

// matchAll answers value if all conditions hold and is left at its end
// otherwise.
func matchAll(args []specs.LinuxSeccompArg, value uint32) block {
	b := block{ret(value)}
	for i := len(args) - 1; i >= 0; i-- {
		b = append(match(args[i], len(b)), b...)
	}
	return b
}

// match is left at its end if arg holds and over otherwise more instructions
// if not. Arguments have 64 bits, registers 32: the high word decides unless
// it is equal. otherwise is small: six conditions are at most 37 instructions.
func match(arg specs.LinuxSeccompArg, otherwise int) block {
	low := load(offArgs + uint32(arg.Index)*8)
	high := load(offArgs + uint32(arg.Index)*8 + 4)
	return operators[arg.Op](low, high, arg.Value, arg.ValueTwo, otherwise)
}

var operators = map[specs.LinuxSeccompOperator]func(low, high unix.SockFilter, v, v2 uint64, no int) block{
	specs.OpEqualTo: func(low, high unix.SockFilter, v, _ uint64, no int) block {
		return block{
			high, cmp(unix.BPF_JEQ, hi(v), 0, no+2),
			low, cmp(unix.BPF_JEQ, lo(v), 0, no),
		}
	},
	specs.OpNotEqual: func(low, high unix.SockFilter, v, _ uint64, no int) block {
		return block{
			high, cmp(unix.BPF_JEQ, hi(v), 0, 2),
			low, cmp(unix.BPF_JEQ, lo(v), no, 0),
		}
	},
	specs.OpGreaterThan: func(low, high unix.SockFilter, v, _ uint64, no int) block {
		return block{
			high, cmp(unix.BPF_JGT, hi(v), 3, 0), cmp(unix.BPF_JEQ, hi(v), 0, no+2),
			low, cmp(unix.BPF_JGT, lo(v), 0, no),
		}
	},
	specs.OpGreaterEqual: func(low, high unix.SockFilter, v, _ uint64, no int) block {
		return block{
			high, cmp(unix.BPF_JGT, hi(v), 3, 0), cmp(unix.BPF_JEQ, hi(v), 0, no+2),
			low, cmp(unix.BPF_JGE, lo(v), 0, no),
		}
	},
	specs.OpLessThan: func(low, high unix.SockFilter, v, _ uint64, no int) block {
		return block{
			high, cmp(unix.BPF_JGT, hi(v), no+3, 0), cmp(unix.BPF_JEQ, hi(v), 0, 2),
			low, cmp(unix.BPF_JGE, lo(v), no, 0),
		}
	},
	specs.OpLessEqual: func(low, high unix.SockFilter, v, _ uint64, no int) block {
		return block{
			high, cmp(unix.BPF_JGT, hi(v), no+3, 0), cmp(unix.BPF_JEQ, hi(v), 0, 2),
			low, cmp(unix.BPF_JGT, lo(v), no, 0),
		}
	},
	specs.OpMaskedEqual: func(low, high unix.SockFilter, mask, v uint64, no int) block {
		return block{
			high, and(hi(mask)), cmp(unix.BPF_JEQ, hi(v&mask), 0, no+3),
			low, and(lo(mask)), cmp(unix.BPF_JEQ, lo(v&mask), 0, no),
		}
	},
}

func hi(v uint64) uint32 { return uint32(v >> 32) }
func lo(v uint64) uint32 { return uint32(v) }
