//go:build !linux

package footprint

import "errors"

func dropProgram() error { return errors.ErrUnsupported }
