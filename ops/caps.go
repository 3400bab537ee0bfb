package ops

import (
	"strings"

	"github.com/moby/buildkit/solver/pb"
	capspb "github.com/moby/buildkit/util/apicaps/pb"
)

// absent are the capabilities that the protocol defines and this daemon doesn't
// have, by the beginning of their ids. Clients are told so, and definitions
// that demand one are refused (LLB-004).
//
// compat: LLB-107, LLB-C28, LLB-C29 no: git bundles; who asks for one is refused (ops/source/git)
// compat: LLB-108, LLB-C25 no: signatures of commits and tags; who asks for a check is refused (ops/source/git)
// compat: LLB-115, LLB-C36 no: signatures of downloads; who asks for a check is refused (ops/source/http)
// compat: LLB-C43 no: the proxy network
// compat: LLB-C76, LLB-C77, LLB-C78 no: cache in GitHub Actions, S3 and Azure; it is refused by name (worker/remotecache)
// compat: LLB-C83 no: attestations; a build that asks for them is warned that they are left out (control/build)
// compat: LLB-C86 no: exporters of sessions
// compat: LLB-C88 no: filters of the history; a request with one is refused (control/history)
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
