//go:build linux && (amd64 || arm64)

package container

import (
	"fmt"
	"slices"

	"github.com/kilnbuild/kiln/executor/native"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// grant returns p without the capabilities that it can't have. The specification
// wants a warning about them, and the container made without.
func (c *Container) grant(p *specs.Process) (*specs.Process, error) {
	if p.Capabilities == nil || c.warn == nil {
		return p, nil
	}
	granted, caps := *p, *p.Capabilities
	granted.Capabilities = &caps
	var refused []string
	for _, set := range []*[]string{&caps.Bounding, &caps.Effective, &caps.Permitted, &caps.Inheritable, &caps.Ambient} {
		can, cannot, err := native.Grantable(c.Spec, *set)
		if err != nil {
			return nil, err
		}
		*set, refused = can, append(refused, cannot...)
	}
	if len(refused) == 0 {
		return p, nil
	}
	slices.Sort(refused)
	c.warn(fmt.Errorf("ignoring unknown or unavailable capabilities: %q", slices.Compact(refused)))
	return &granted, nil
}
