package contenthash

import (
	"fmt"
	"strings"

	"github.com/kilnbuild/kiln/internal/files"
)

// readXattrs returns the attributes that enter a digest. Those in which overlay
// keeps its books are no content: a mount hides them, a plain layer doesn't.
func readXattrs(x files.Xattrs) (map[string][]byte, error) {
	names, err := x.Names()
	if err != nil {
		return nil, fmt.Errorf("list extended attributes: %w", err)
	}
	var xattrs map[string][]byte
	for _, name := range names {
		if !xattrHashed(name) || strings.HasPrefix(name, "trusted.overlay.") {
			continue
		}
		value, ok, err := x.Get(name)
		if err != nil {
			return nil, fmt.Errorf("read extended attribute %s: %w", name, err)
		}
		if !ok {
			continue
		}
		if xattrs == nil {
			xattrs = map[string][]byte{}
		}
		xattrs[name] = value
	}
	return xattrs, nil
}
