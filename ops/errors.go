package ops

import (
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// DefinitionError says which op of a definition is at fault, where in it, and
// why. It crosses the wire with its gRPC code.
type DefinitionError struct {
	Op    digest.Digest // "" if it is no single op
	Field string        // such as "exec.mounts[2].input"; "" is the whole op
	Code  codes.Code
	Err   error
}

func (e *DefinitionError) Error() string {
	msg := e.Err.Error()
	if e.Field != "" {
		msg = e.Field + ": " + msg
	}
	if e.Op != "" {
		return "op " + string(e.Op) + ": " + msg
	}
	return "definition: " + msg
}

func (e *DefinitionError) Unwrap() error { return e.Err }

// GRPCStatus makes the code and the message of e those of an RPC's error.
func (e *DefinitionError) GRPCStatus() *status.Status { return status.New(e.Code, e.Error()) }

// invalid is a fault in the given field of an op. Load adds which op it is.
func invalid(field, format string, args ...any) error {
	return &DefinitionError{Field: field, Code: codes.InvalidArgument, Err: fmt.Errorf(format, args...)}
}

// denied is a wish for something that the build was not granted.
func denied(field, format string, args ...any) error {
	return &DefinitionError{Field: field, Code: codes.PermissionDenied, Err: fmt.Errorf(format, args...)}
}

// unsupported is a wish for something that this daemon doesn't offer.
func unsupported(field, format string, args ...any) error {
	return &DefinitionError{Field: field, Code: codes.Unimplemented, Err: fmt.Errorf(format, args...)}
}

// within returns err, a fault in a field of what outer names, as one of outer.
func within(outer string, err error) error {
	var de *DefinitionError
	if !errors.As(err, &de) {
		return fmt.Errorf("%s: %w", outer, err)
	}
	inner := *de
	inner.Field = outer + "." + de.Field
	return &inner
}

// inOp returns err as a *DefinitionError that names the op.
func inOp(dgst digest.Digest, err error) error {
	var de *DefinitionError
	if errors.As(err, &de) && de.Op == "" {
		named := *de
		named.Op = dgst
		return &named
	}
	return &DefinitionError{Op: dgst, Code: codes.InvalidArgument, Err: err}
}
