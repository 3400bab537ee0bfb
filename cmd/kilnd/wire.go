package main

import (
	"log/slog"

	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/executor/network"
	"github.com/kilnbuild/kiln/ops/source/registry"
	"github.com/kilnbuild/kiln/worker"
)

// network is what steps get that ask for no network in particular.
func (cfg *config) network() network.Config {
	oci := cfg.Worker.OCI
	return network.Config{
		Mode: network.Mode(oci.NetworkMode), CNIConfig: oci.CNIConfigPath, CNIBinaries: oci.CNIBinaryPath, PoolSize: oci.CNIPoolSize,
		BridgeName: oci.BridgeName, BridgeSubnet: oci.BridgeSubnet,
	}
}

// workerConfig is the worker's part of the config.
func workerConfig(cfg *config, log *slog.Logger) worker.Config {
	oci := cfg.Worker.OCI
	out := worker.Config{
		Supervisor: []string{"/proc/self/exe", superviseName}, Unclaimed: cfg.unclaimed,
		CancelGrace: max(cfg.cancel, 1), // none is a very short one
		Root:        cfg.Root, Labels: oci.Labels, Platforms: oci.Platforms, Runtime: oci.Binary,
		CgroupParent: oci.DefaultCgroupParent, AppArmor: oci.AppArmorProfile, Most: cfg.most, MachinePIDs: oci.NoProcessSandbox, Parallelism: oci.MaxParallelism, GC: cfg.gc, Log: log, Network: cfg.network(),
		Registry: registry.Config{Hosts: map[string]registry.HostConfig{}, MaxConcurrency: cfg.System.MaxRegistryConcurrency},
	}
	if d := cfg.DNS; d != nil {
		out.DNS = &executor.DNS{Nameservers: d.Nameservers, Options: d.Options, SearchDomains: d.SearchDomains}
	}
	for host, r := range cfg.Registry {
		hc := registry.HostConfig{
			Mirrors: r.Mirrors, PlainHTTP: r.PlainHTTP, Insecure: r.Insecure, RootCAs: r.RootCAs, TLSConfigDirs: r.TLSConfigDir,
		}
		for _, p := range r.KeyPairs {
			hc.KeyPairs = append(hc.KeyPairs, registry.KeyPair{Key: p.Key, Cert: p.Cert})
		}
		out.Registry.Hosts[host] = hc
	}
	return out
}
