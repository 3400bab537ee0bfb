// Package remotecache keeps build cache outside of the daemon, and gets it from
// there: in a registry, in a directory of the client, or inside the images that a
// build makes. The format is that of package cache/remote.
//
// An Import is asked by the solver beside the daemon's own keys. What it has is
// loaded as lazy layers: their bytes are fetched when something needs them. That
// an import can't be read, or that a layer can't be had later, costs a build only
// the steps that made what is missing.
package remotecache

import (
	"fmt"
	"strconv"

	"github.com/kilnbuild/kiln/cache"
	"github.com/kilnbuild/kiln/cache/remote"
	"github.com/kilnbuild/kiln/ops/source/registry"
	"github.com/moby/buildkit/session"
)

// Config is what imports and exporters work with.
type Config struct {
	Cache    *cache.Manager
	Keys     remote.KeyStore
	Sessions *session.Manager
	Registry *registry.Client
}

// Client is for whom a cache is read or written, with whose credentials.
type Client struct{ SessionID string }

func (c Client) group() session.Group { return session.NewGroup(c.SessionID) }

// types that are refused by name, so that whoever uses them knows why nothing is
// found.
var elsewhere = map[string]bool{"gha": true, "s3": true, "azblob": true}

func unknown(typ, what, there string) error {
	if elsewhere[typ] {
		return fmt.Errorf("this daemon has no cache %s of type %s; there are %s", what, typ, there)
	}
	return fmt.Errorf("no cache %s of type %q; there are %s", what, typ, there)
}

// flags reads the attributes named in dst that are there.
func flags(attrs map[string]string, dst map[string]*bool) error {
	for name, to := range dst {
		v, ok := attrs[name]
		if !ok {
			continue
		}
		b, err := strconv.ParseBool(v)
		if err != nil {
			return fmt.Errorf("%s: %q is neither true nor false", name, v)
		}
		*to = b
	}
	return nil
}
