package gateway

import (
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/util/apicaps"
	capspb "github.com/moby/buildkit/util/apicaps/pb"
)

// disabledCaps are the frontend capabilities that the protocol defines and this
// daemon doesn't have; clients are told so and leave them alone.
var disabledCaps = map[apicaps.CapID]string{
	gwpb.CapAttestations:                        "attestations are not exported",
	gwpb.CapSourceMetaResolverImageAttestations: "attestation chains are not resolved",
}

// frontendCaps lists the capabilities of the frontend API (GW-C01 to -C27).
func frontendCaps() []*capspb.APICap {
	all := gwpb.Caps.All()
	for _, c := range all {
		if reason, off := disabledCaps[apicaps.CapID(c.ID)]; off {
			c.Enabled = false
			c.DisabledReasonMsg = reason
		}
	}
	return all
}
