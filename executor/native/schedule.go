//go:build linux && (amd64 || arm64)

package native

import (
	"fmt"
	"math/bits"
	"strconv"
	"strings"
	"unsafe"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

var policies = map[specs.LinuxSchedulerPolicy]uint32{
	specs.SchedOther: unix.SCHED_NORMAL, specs.SchedFIFO: unix.SCHED_FIFO, specs.SchedRR: unix.SCHED_RR, specs.SchedBatch: unix.SCHED_BATCH,
	specs.SchedIdle: unix.SCHED_IDLE, specs.SchedDeadline: unix.SCHED_DEADLINE,
}

var policyFlags = map[specs.LinuxSchedulerFlag]uint64{
	specs.SchedFlagResetOnFork: unix.SCHED_FLAG_RESET_ON_FORK, specs.SchedFlagReclaim: unix.SCHED_FLAG_RECLAIM,
	specs.SchedFlagDLOverrun: unix.SCHED_FLAG_DL_OVERRUN, specs.SchedFlagKeepPolicy: unix.SCHED_FLAG_KEEP_POLICY,
	specs.SchedFlagKeepParams: unix.SCHED_FLAG_KEEP_PARAMS, specs.SchedFlagUtilClampMin: unix.SCHED_FLAG_UTIL_CLAMP_MIN,
	specs.SchedFlagUtilClampMax: unix.SCHED_FLAG_UTIL_CLAMP_MAX,
}

var ioClasses = map[specs.IOPriorityClass]int{specs.IOPRIO_CLASS_RT: 1, specs.IOPRIO_CLASS_BE: 2, specs.IOPRIO_CLASS_IDLE: 3}

// schedule sets how the process is scheduled, while it still may.
func (m *member) schedule() error {
	if s := m.spec.Process.Scheduler; s != nil {
		attr, err := schedAttr(s)
		if err != nil {
			return err
		}
		m.Call("process.scheduler "+string(s.Policy), unix.SYS_SCHED_SETATTR, 0, m.Bytes(unsafe.Slice((*byte)(unsafe.Pointer(&attr)), unix.SizeofSchedAttr)), 0)
	}
	if p := m.spec.Process.IOPriority; p != nil {
		class, ok := ioClasses[p.Class]
		if !ok {
			return fmt.Errorf("process.ioPriority.class %q is none of IOPRIO_CLASS_RT, IOPRIO_CLASS_BE and IOPRIO_CLASS_IDLE", p.Class)
		}
		if p.Priority < 0 || p.Priority > 7 {
			return fmt.Errorf("process.ioPriority.priority %d is not one of 0 to 7", p.Priority)
		}
		const process, classShift = 1, 13
		m.Call(fmt.Sprintf("process.ioPriority %s %d", p.Class, p.Priority), unix.SYS_IOPRIO_SET, process, 0, uintptr(class<<classShift|p.Priority))
	}
	return nil
}

func schedAttr(s *specs.Scheduler) (unix.SchedAttr, error) {
	policy, ok := policies[s.Policy]
	if !ok {
		return unix.SchedAttr{}, fmt.Errorf("process.scheduler.policy %q is not one that Linux has", s.Policy)
	}
	if s.Priority < 0 {
		return unix.SchedAttr{}, fmt.Errorf("process.scheduler.priority %d is below 0", s.Priority)
	}
	attr := unix.SchedAttr{
		Size: unix.SizeofSchedAttr, Policy: policy, Nice: s.Nice, Priority: uint32(s.Priority), Runtime: s.Runtime, Deadline: s.Deadline, Period: s.Period,
	}
	for _, name := range s.Flags {
		flag, ok := policyFlags[name]
		if !ok {
			return attr, fmt.Errorf("process.scheduler.flags: %q is not one that Linux has", name)
		}
		attr.Flags |= flag
	}
	return attr, nil
}

// affinity binds the process to processors, a list such as "0-3,7".
func (b *builder) affinity(what, list string) error {
	if list == "" {
		return nil
	}
	mask, err := parseCPUs(list)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	b.Call(what+" "+list, unix.SYS_SCHED_SETAFFINITY, 0, uintptr(len(mask)*bits.UintSize/8), b.Words(mask...))
	return nil
}

// maxCPU is above what a kernel can be configured for.
const maxCPU = 8192

func parseCPUs(list string) ([]uintptr, error) {
	var mask []uintptr
	for part := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(strings.TrimSpace(part), "-")
		if !isRange {
			last = first
		}
		from, err := strconv.ParseUint(first, 10, 32)
		to, lerr := strconv.ParseUint(last, 10, 32)
		if err != nil || lerr != nil || from > to || to >= maxCPU {
			return nil, fmt.Errorf("%q is not a list of processors such as 0-3,7", list)
		}
		for cpu := from; cpu <= to; cpu++ {
			for len(mask) <= int(cpu)/bits.UintSize {
				mask = append(mask, 0)
			}
			mask[cpu/bits.UintSize] |= 1 << (cpu % bits.UintSize)
		}
	}
	return mask, nil
}
