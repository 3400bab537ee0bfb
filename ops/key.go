package ops

import (
	"encoding/json"
	"fmt"

	"github.com/kilnbuild/kiln/solver"
	"github.com/opencontainers/go-digest"
)

// definitionKey is the cache map of an op that is known by its definition: the
// digest of v's JSON. Registry caches hold these digests, so the JSON, which
// includes that of the protocol's own types, has to stay byte for byte what
// upstream's is.
func definitionKey(v any, inputs int) (*solver.CacheMap, bool, error) {
	dt, err := json.Marshal(v)
	if err != nil {
		return nil, false, fmt.Errorf("encode op for its cache key: %w", err)
	}
	return &solver.CacheMap{Digest: digest.FromBytes(dt), Deps: make([]solver.Dep, inputs)}, false, nil
}
