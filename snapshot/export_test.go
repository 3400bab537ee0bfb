package snapshot

import "testing"

// WithKernel has the test believe in a kernel that lacks newer mount calls.
func WithKernel(t testing.TB, layers, clones bool) {
	real := features
	f := mountFeatures{layers: layers, clones: clones}
	features = func() mountFeatures { return f }
	t.Cleanup(func() { features = real })
}

// Kernel says what the kernel can do.
func Kernel() (layers, clones bool) {
	f := features()
	return f.layers, f.clones
}

// OpenShares is how many writable overlays are mounted.
func OpenShares() int {
	shares.mu.Lock()
	defer shares.mu.Unlock()
	return len(shares.m)
}

// StackAtMost has o make grounds as if the kernel could stack no more than n layers.
func StackAtMost(o *Overlay, n int) { o.most = n }

// LayerDir is where the files of a snapshot are.
func LayerDir(o *Overlay, id string) string { return o.fsPath(id) }
