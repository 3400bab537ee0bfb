package gateway

import (
	"slices"

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

// containerCaps are those that need containers.
var containerCaps = []apicaps.CapID{
	gwpb.CapGatewayExec, gwpb.CapGatewayExecExtraHosts, gwpb.CapGatewayExecSecretEnv, gwpb.CapGatewayExecSignals, gwpb.CapGatewayExecFilesystem,
}

// frontendCaps lists the capabilities of the frontend API (GW-C01 to -C27).
// noContainers says why there are no containers.
func frontendCaps(noContainers string) []*capspb.APICap {
	all := gwpb.Caps.All()
	for _, c := range all {
		reason, off := disabledCaps[apicaps.CapID(c.ID)]
		if noContainers != "" && slices.Contains(containerCaps, apicaps.CapID(c.ID)) {
			reason, off = noContainers, true
		}
		if off {
			c.Enabled = false
			c.DisabledReasonMsg = reason
		}
	}
	return all
}
