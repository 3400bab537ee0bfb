package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/kilnbuild/kiln/internal/suggest"
)

// configKeys are the keys of buildkitd.toml (DMN-030 to -047); the value tells
// whether kiln has the feature. A "*" stands for any one name.
var configKeys = map[string]bool{
	"root": true, "debug": true, "trace": true, "insecure-entitlements": true,
	"proxyNetwork": false, "provenanceEnvDir": false,
	"log.format": true, "log.level": true,
	"grpc.address": true, "grpc.uid": true, "grpc.gid": true, "grpc.debugAddress": true, "grpc.securityDescriptor": false,
	"grpc.tls.cert": true, "grpc.tls.key": true, "grpc.tls.ca": true,
	"otel.socketPath": false,
	"cdi.disabled":    false, "cdi.specDirs": false, "cdi.autoAllowed": false,
	"dns.nameservers": true, "dns.options": true, "dns.searchDomains": true,
	"history.maxAge": true, "history.maxEntries": true,
	"system.platformsCacheMaxAge": false, "system.maxRegistryConcurrency": true,
	"frontend.*.enabled": false, "frontend.*.allowedRepositories": false, "frontend.*.options": false,
	"cache.verify":     true, // kiln's own
	"kiln.stepTimeout": true, "kiln.noOutputTimeout": true, "kiln.buildTimeout": true,
	"kiln.stepMemory": true, "kiln.stepCPUs": true, "kiln.stepPids": true,
	"kiln.unclaimedStepTimeout": true, "kiln.cancelGrace": true, "kiln.recordBuilds": true, "kiln.maxLogStorage": true,
	"cache.gha.sign.command": false, "cache.gha.verify.required": false, "cache.gha.verify.policy.*": false,

	"worker.oci.enabled": false, "worker.oci.labels.*": true, "worker.oci.platforms": true,
	"worker.oci.snapshotter": true, "worker.oci.rootless": true, "worker.oci.noProcessSandbox": true,
	"worker.oci.binary": true, "worker.oci.proxySnapshotterPath": false, "worker.oci.defaultCgroupParent": true,
	"worker.oci.apparmor-profile": true, "worker.oci.selinux": false, "worker.oci.max-parallelism": true,
	"worker.oci.userRemapUnsupported": false, "worker.oci.networkMode": true,
	"worker.oci.cniConfigPath": true, "worker.oci.cniBinaryPath": true, "worker.oci.cniPoolSize": true,
	"worker.oci.bridgeName": true, "worker.oci.bridgeSubnet": true,
	"worker.oci.gc": true, "worker.oci.gckeepstorage": true, "worker.oci.reservedSpace": true,
	"worker.oci.maxUsedSpace": true, "worker.oci.minFreeSpace": true,
	"worker.oci.gcpolicy.all": true, "worker.oci.gcpolicy.filters": true, "worker.oci.gcpolicy.keepDuration": true,
	"worker.oci.gcpolicy.keepBytes": true, "worker.oci.gcpolicy.reservedSpace": true,
	"worker.oci.gcpolicy.maxUsedSpace": true, "worker.oci.gcpolicy.minFreeSpace": true,
	"worker.oci.stargzSnapshotter": false,
	"worker.containerd":            false,

	"registry.*.mirrors": true, "registry.*.http": true, "registry.*.insecure": true, "registry.*.ca": true,
	"registry.*.keypair": true, "registry.*.tlsconfigdir": true,
}

// checkKeys warns of keys whose feature isn't there, and refuses unknown ones
// with the nearest match.
func checkKeys(tree map[string]any) (warnings []string, err error) {
	err = walkKeys(tree, nil, func(path []string) error {
		key, ok := matchKey(path)
		if !ok {
			return fmt.Errorf("unknown key %s%s", strings.Join(path, "."), nearestKey(path))
		}
		if !configKeys[key] {
			warnings = append(warnings, fmt.Sprintf("config key %s has no effect: this version of kiln doesn't have the feature", strings.Join(path, ".")))
		}
		return nil
	})
	return warnings, err
}

// walkKeys calls fn for every leaf, in order. A table that is a key by itself
// is a leaf, and a list of tables is as each of them.
func walkKeys(tree map[string]any, prefix []string, fn func(path []string) error) error {
	for _, name := range slices.Sorted(maps.Keys(tree)) {
		path := append(slices.Clone(prefix), name)
		subs := tables(tree[name])
		if _, whole := matchKey(path); subs == nil || whole {
			if err := fn(path); err != nil {
				return err
			}
			continue
		}
		for _, sub := range subs {
			if err := walkKeys(sub, path, fn); err != nil {
				return err
			}
		}
	}
	return nil
}

// tables are the tables that a value consists of; nil if it is something else.
func tables(value any) (out []map[string]any) {
	switch v := value.(type) {
	case map[string]any:
		return []map[string]any{v}
	case []any:
		for _, e := range v {
			t, ok := e.(map[string]any)
			if !ok {
				return nil
			}
			out = append(out, t)
		}
	}
	return out
}

// matchKey returns the entry of configKeys that path is.
func matchKey(path []string) (string, bool) {
	for key := range configKeys {
		if parts := strings.Split(key, "."); slices.EqualFunc(parts, path, func(part, name string) bool {
			return part == "*" || part == name
		}) {
			return key, true
		}
	}
	return "", false
}

// nearestKey suggests what the user may have meant.
func nearestKey(path []string) string {
	return suggest.Nearest(strings.Join(path, "."), slices.Sorted(maps.Keys(configKeys)))
}
