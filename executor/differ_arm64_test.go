package executor

// riskyNames are risky calls that other architectures don't have.
func riskyNames() []uintptr { return nil }
