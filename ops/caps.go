package ops

import (
	"strings"

	"github.com/moby/buildkit/solver/pb"
	capspb "github.com/moby/buildkit/util/apicaps/pb"
)

// absent are the capabilities that the protocol defines and this daemon doesn't
// have, by the beginning of their ids. Clients are told so, and definitions
// that demand one are refused (LLB-004).
var absent = []struct{ prefix, reason string }{
	{"source.git.signatureverify", "signatures of git commits and tags are not verified"},
	{"source.git.bundle", "git bundles are not fetched from"},
	{"source.git.checkoutbundle", "git bundles are not made"},
	{"source.http.signatureverify", "signatures of downloads are not verified"},
	{"exec.meta.network.proxy", "the proxy network is not supported"},
	{"cache.", "remote caches are not supported"},
	{"exporter.image.attestations", "attestations are not exported"},
	{"exporter.session", "exporters of sessions are not asked for"},
	{"history.filter", "the history is not filtered"},
}

// Caps lists the capabilities of definitions (LLB-C01 to -C88), with those
// disabled that the daemon doesn't have.
func Caps() []*capspb.APICap {
	all := pb.Caps.All()
	for _, c := range all {
		for _, a := range absent {
			if strings.HasPrefix(c.ID, a.prefix) {
				c.Enabled, c.DisabledReasonMsg = false, a.reason
			}
		}
	}
	return all
}
