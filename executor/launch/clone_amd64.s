//go:build linux

#include "textflag.h"

// func clone(args *cloneArgs, steps *step, out *outcome) int64
//
// It returns in the parent only, when the child has executed or exited. The
// child stays below the label child: it uses no stack, since it shares the
// parent's, and no Go code.
TEXT ·clone(SB), NOSPLIT, $0-32
	CALL runtime·entersyscall(SB)
	MOVQ args+0(FP), DI
	MOVQ steps+8(FP), R12
	MOVQ out+16(FP), R13
	MOVQ $88, SI            // sizeof(cloneArgs)
	MOVQ $435, AX           // clone3
	SYSCALL
	TESTQ AX, AX
	JZ   child
	MOVQ AX, ret+24(FP)
	CALL runtime·exitsyscall(SB)
	RET

child:
	RDTSC
	SHLQ $32, DX
	ORQ  DX, AX
	MOVQ AX, 8(R13)         // outcome.start

loop:
	MOVQ 0(R12), AX
	MOVQ 8(R12), DI
	MOVQ 16(R12), SI
	MOVQ 24(R12), DX
	MOVQ 32(R12), R10
	MOVQ 40(R12), R8
	MOVQ 48(R12), R9
	SYSCALL
	MOVQ AX, BX
	MOVQ AX, 88(R12)        // step.result
	RDTSC
	SHLQ $32, DX
	ORQ  DX, AX
	MOVQ AX, 96(R12)        // step.ticks
	TESTQ BX, BX
	JLT  error
	JEQ  succeeded
	MOVQ 80(R12), CX        // step.mustZero
	TESTQ CX, CX
	JNZ  fail

succeeded:
	MOVQ 72(R12), CX        // step.store
	TESTQ CX, CX
	JZ   advance
	MOVQ BX, (CX)

advance:
	ADDQ 64(R12), R12       // step.next
	JMP  loop

error:
	NEGQ BX
	CMPQ BX, $64
	JAE  fail
	MOVQ 56(R12), CX        // step.tolerate
	BTQ  BX, CX
	JCC  fail
	ADDQ $104, R12          // sizeof(step)
	JMP  loop

fail:
	MOVQ R12, 0(R13)        // outcome.failed

	MOVQ $1, DI
	MOVQ $231, AX           // exit_group
	SYSCALL
	UD2                     // a seccomp filter refused even that
