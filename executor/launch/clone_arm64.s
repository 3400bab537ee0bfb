//go:build linux

#include "textflag.h"

// See clone_amd64.s.
//
// func clone(args *cloneArgs, steps *step, out *outcome) int64
TEXT ·clone(SB), NOSPLIT, $0-32
	BL   runtime·entersyscall(SB)
	MOVD args+0(FP), R0
	MOVD steps+8(FP), R19
	MOVD out+16(FP), R20
	MOVD $88, R1            // sizeof(cloneArgs)
	MOVD $435, R8           // clone3
	SVC
	CBZ  R0, child
	MOVD R0, ret+24(FP)
	BL   runtime·exitsyscall(SB)
	RET

child:
	MRS  CNTVCT_EL0, R9
	MOVD R9, 8(R20)         // outcome.start

loop:
	MOVD 0(R19), R8
	MOVD 8(R19), R0
	MOVD 16(R19), R1
	MOVD 24(R19), R2
	MOVD 32(R19), R3
	MOVD 40(R19), R4
	MOVD 48(R19), R5
	SVC
	MOVD R0, 88(R19)        // step.result
	MRS  CNTVCT_EL0, R9
	MOVD R9, 96(R19)        // step.ticks
	CMP  $0, R0
	BLT  error
	BEQ  succeeded
	MOVD 80(R19), R9        // step.mustZero
	CBNZ R9, fail

succeeded:
	MOVD 72(R19), R9        // step.store
	CBZ  R9, advance
	MOVD R0, (R9)

advance:
	MOVD 64(R19), R9        // step.next
	ADD  R9, R19
	B    loop

error:
	NEG  R0, R0
	CMP  $64, R0
	BHS  fail
	MOVD 56(R19), R9        // step.tolerate
	LSR  R0, R9, R9
	TBZ  $0, R9, fail
	ADD  $104, R19          // sizeof(step)
	B    loop

fail:
	MOVD R19, 0(R20)        // outcome.failed

	MOVD $1, R0
	MOVD $94, R8            // exit_group
	SVC
	UNDEF                   // a seccomp filter refused even that
