// Package version says what this build of kiln is.
package version

// Kiln is the release of kiln; the linker sets it for releases.
var Kiln = "0.1.0-dev"

// Revision is the source revision; the linker sets it.
var Revision = ""

// Package is what clients are told as the daemon's package.
const Package = "github.com/kilnbuild/kiln"

// protocol is the release of the protocol's definition that kiln speaks.
// Clients gate features on it.
const protocol = "v0.33.1"

// Dockerfile is the version of the Dockerfile syntax that the built-in frontend
// understands.
const Dockerfile = "1.25"

// Protocol is the version that clients are told: the protocol's release, which
// they compare, with kiln's own as build metadata, which they ignore.
func Protocol() string { return protocol + "+kiln." + Kiln }
