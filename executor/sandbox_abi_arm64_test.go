package executor

import "io"

// probeABIs has nothing to try: another ABI takes another program.
func probeABIs(io.Writer) error { return nil }
