package ops

import (
	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/solver/pb"
)

// lowCPUShares is what a step that nobody waits for gets of processors that
// others want too; the least that there is.
const lowCPUShares = 2

// Repeat returns v's op for executing it once more in the background, when the
// client that asked for it has left. Where that can't be done, or would be
// noticed elsewhere, it returns nil and what of the step is in the way.
func Repeat(v *solver.Vertex) (op solver.Op, obstacle string) {
	switch op := v.Op.(type) {
	case *execOp:
		if why := op.onlyOnce(); why != "" {
			return nil, why
		}
		return op.inBackground(), ""
	case *fileOp, *mergeOp, *diffOp:
		return v.Op, ""
	case *passthroughOp:
		return nil, "passthrough" // makes nothing
	case *nestedOp:
		return nil, "nested build" // its steps are verified by themselves
	case *sourceOp:
		return nil, "source" // what is there now is another question
	}
	return nil, "unknown"
}

// onlyOnce says what keeps the step from being run again: "" for nothing.
func (e *execOp) onlyOnce() string {
	for _, m := range e.op.Mounts {
		if m.MountType == pb.MountType_CACHE {
			return "cache mount" // it would change for the next build
		}
	}
	switch {
	case len(e.wantedSecrets()) > 0:
		return "secret"
	case e.usesSSH():
		return "ssh"
	case e.op.Security == pb.SecurityMode_INSECURE:
		return "insecure" // it may change the machine
	}
	return ""
}

// inBackground is e with a low priority.
func (e *execOp) inBackground() *execOp {
	low := *e
	if low.resources = e.resources.CloneVT(); low.resources == nil {
		low.resources = &pb.LinuxResources{}
	}
	low.resources.CpuShares = lowCPUShares
	return &low
}
