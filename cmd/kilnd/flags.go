package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/executor/network"
	"github.com/kilnbuild/kiln/internal/rootless"
	"github.com/kilnbuild/kiln/internal/suggest"
	"github.com/kilnbuild/kiln/internal/version"
	"github.com/urfave/cli/v3"
)

// unbuilt flags are those of buildkitd whose feature kiln doesn't have yet.
// They are accepted, so that existing command lines start the daemon, and each
// one that is set is warned of once.
func unbuilt() []cli.Flag {
	return []cli.Flag{
		&cli.BoolFlag{Name: "proxy-network", Usage: "enforce the proxy network"},
		&cli.StringFlag{Name: "otel-socket-path", Usage: "OTEL collector trace socket path"},
		&cli.BoolFlag{Name: "cdi-disabled", Usage: "disable CDI devices"},
		&cli.StringSliceFlag{Name: "cdi-spec-dir", Usage: "directory of CDI specs"},
		&cli.BoolFlag{Name: "save-cache-debug", Usage: "record what cache keys are made of"},
		&cli.StringFlag{Name: "oci-worker-proxy-snapshotter-path", Usage: "proxy snapshotter socket"},
		&cli.BoolFlag{Name: "oci-worker-selinux", Usage: "SELinux labels for steps"},
		&cli.StringFlag{Name: "containerd-worker", Usage: "containerd worker"},
		&cli.StringFlag{Name: "containerd-worker-addr", Usage: "containerd socket"},
		&cli.StringSliceFlag{Name: "containerd-worker-labels", Usage: "worker labels"},
		&cli.StringSliceFlag{Name: "containerd-worker-platform", Hidden: true},
		&cli.StringFlag{Name: "containerd-worker-namespace", Hidden: true},
		&cli.StringFlag{Name: "containerd-worker-runtime", Hidden: true},
		&cli.StringFlag{Name: "containerd-worker-snapshotter", Usage: "snapshotter name"},
		&cli.BoolFlag{Name: "containerd-worker-rootless", Usage: "rootless mode"},
		&cli.StringFlag{Name: "containerd-worker-net", Usage: "worker network type"},
		&cli.StringFlag{Name: "containerd-cni-config-path", Usage: "path of CNI config file"},
		&cli.StringFlag{Name: "containerd-cni-binary-dir", Usage: "path of CNI binary files"},
		&cli.IntFlag{Name: "containerd-cni-pool-size", Usage: "size of the CNI network namespace pool"},
		&cli.BoolFlag{Name: "containerd-worker-gc", Usage: "automatic garbage collection"},
		&cli.StringFlag{Name: "containerd-worker-gc-keepstorage", Usage: "storage that automatic garbage collection keeps"},
		&cli.StringFlag{Name: "containerd-worker-apparmor-profile", Usage: "AppArmor profile of steps"},
		&cli.BoolFlag{Name: "containerd-worker-selinux", Usage: "SELinux labels for steps"},
		&cli.IntFlag{Name: "containerd-max-parallelism", Usage: "steps that run at once"},
	}
}

// built flags take effect.
func built() []cli.Flag {
	paths := rootless.Defaults()
	return []cli.Flag{
		&cli.StringFlag{Name: "config", Usage: "path to config file", DefaultText: paths.Config},
		&cli.StringFlag{Name: "root", Usage: "path to state directory", DefaultText: paths.Root},
		&cli.StringSliceFlag{Name: "addr", Usage: "listening address (unix:// or tcp://), repeatable", DefaultText: paths.Address},
		&cli.BoolFlag{Name: "rootless", Usage: "a user's own config, state directory and address by default, as an ordinary user's daemon has them anyway"},
		&cli.StringFlag{Name: "group", Usage: "group (name or gid) that will own the unix sockets"},
		&cli.BoolFlag{Name: "debug", Usage: "enable debug output in logs"},
		&cli.BoolFlag{Name: "trace", Usage: "deprecated: as --debug", Hidden: true},
		&cli.StringFlag{Name: "debugaddr", Usage: "address that serves metrics and debug pages over HTTP", Sources: cli.EnvVars("BUILDKITD_DEBUGADDR")},
		&cli.StringFlag{Name: "log-level", Usage: "debug, info, warn or error", Sources: cli.EnvVars("BUILDKITD_LOG_LEVEL")},
		&cli.StringFlag{Name: "log-format", Usage: "text or json", Value: "text"},
		&cli.StringFlag{Name: "tlscert", Usage: "certificate file for tcp listeners"},
		&cli.StringFlag{Name: "tlskey", Usage: "key file"},
		&cli.StringFlag{Name: "tlscacert", Usage: "CA certificate that clients must be signed by"},
		&cli.StringSliceFlag{Name: "allow-insecure-entitlement", Usage: "entitlements that builds may ask for: network.host, security.insecure, device"},
		&cli.StringFlag{Name: "oci-worker", Usage: "OCI worker: auto or true", Value: "auto"},
		&cli.StringSliceFlag{Name: "oci-worker-labels", Usage: "worker labels, key=value"},
		&cli.StringSliceFlag{Name: "oci-worker-platform", Usage: "platforms to announce, the default one first"},
		&cli.StringFlag{Name: "oci-worker-snapshotter", Usage: "auto or overlayfs", Value: "auto"},
		&cli.StringFlag{Name: "oci-worker-binary", Usage: "OCI runtime that runs steps, such as runc; the built-in one if empty"},
		&cli.BoolFlag{Name: "oci-worker-rootless", Usage: "accepted: steps are rootless where an ordinary user starts the daemon"},
		&cli.BoolFlag{Name: "oci-worker-no-process-sandbox", Usage: "steps are among the machine's processes, for a rootless daemon in a container that hides a part of /proc"},
		&cli.StringFlag{Name: "oci-worker-apparmor-profile", Usage: "AppArmor profile of steps, loaded already"},
		&cli.StringFlag{Name: "oci-worker-net", Usage: "network of steps: auto, host, bridge, cni or none", Value: "auto"},
		&cli.StringFlag{Name: "oci-cni-config-path", Usage: "CNI config file: a plugin or, if it ends in .conflist, a list of them", Value: network.DefaultCNIConfig},
		&cli.StringFlag{Name: "oci-cni-binary-dir", Usage: "directory of CNI plugins", Value: network.DefaultCNIBinaries},
		&cli.IntFlag{Name: "oci-cni-pool-size", Usage: "namespaces that are made ahead, with cni and bridge; by default what suits the processors"},
		&cli.BoolFlag{Name: "oci-worker-gc", Usage: "keep the cache within bounds, in the background", Value: true},
		&cli.StringFlag{Name: "oci-worker-gc-keepstorage", Usage: "space of the default bounds, as reserved[,free[,max]] in MB; shares of the disk if empty"},
		&cli.IntFlag{Name: "oci-max-parallelism", Usage: "steps that run at once; 0 is no bound"},
		&cli.FloatFlag{Name: "cache-verify", Usage: "share of cache hits, 0 to 1, that are executed again and compared while no build runs"},
		&cli.StringFlag{Name: "record-builds", Usage: "directory that gets a file of what the solver does in each build, for reports of defects"},
		&cli.DurationFlag{Name: "step-timeout", Usage: "end steps that run longer, unless a build says otherwise (--opt kiln.step-timeout); 0 is never"},
		&cli.DurationFlag{Name: "no-output-timeout", Usage: "end steps that print nothing for longer, unless a build says otherwise (--opt kiln.no-output-timeout); 0 is never"},
		&cli.StringFlag{Name: "step-memory", Usage: "memory that a step gets at most, such as 4GB; what needs more is killed"},
		&cli.FloatFlag{Name: "step-cpus", Usage: "processors that a step keeps busy at most, such as 1.5; 0 is no bound"},
		&cli.Int64Flag{Name: "step-pids", Usage: "processes and threads that a step has at once at most; 0 is no bound"},
		&cli.DurationFlag{Name: "build-timeout", Usage: "end builds that take longer, unless they say otherwise (--opt kiln.build-timeout); 0 is never"},
		&cli.DurationFlag{Name: "cancel-grace", Usage: "how long a cancelled step may take to end after TERM; 0: it is killed at once", Value: executor.DefaultGrace},
		&cli.DurationFlag{Name: "unclaimed-step-timeout", Usage: "how long steps go on without a daemon; 0: they end with it", Value: defaultUnclaimed},
		&cli.DurationFlag{Name: "idle-exit", Usage: "end when no client has been connected for this long; 0 is never"},
		&cli.DurationFlag{Name: "grace", Usage: "time that running builds get after SIGTERM", Value: defaultGrace},
	}
}

func command() *cli.Command {
	// A comma is part of many values, such as platforms and GC sizes.
	return &cli.Command{
		Name:                      "kilnd",
		Usage:                     "build daemon",
		Version:                   strings.Join([]string{version.Package, version.Protocol(), version.Revision}, " "),
		Flags:                     append(built(), unbuilt()...),
		Suggest:                   true,
		DisableSliceFlagSeparator: true,
		HideHelpCommand:           true,
		Action: func(ctx context.Context, c *cli.Command) error {
			if c.Args().Present() {
				return fmt.Errorf("unknown argument %q; kilnd takes flags only, and the command fsck", c.Args().First())
			}
			cfg, warnings, err := loadConfig(c)
			if err != nil {
				return err
			}
			return serve(ctx, cfg, warnings)
		},
		Commands:     []*cli.Command{superviseCommand(), holdCommand(), fsckCommand()},
		OnUsageError: func(_ context.Context, c *cli.Command, err error, _ bool) error { return suggest.Flag(err, c) },
	}
}

// unbuiltWarnings names every flag that was set though its feature isn't there.
func unbuiltWarnings(c *cli.Command) []string {
	var out []string
	for _, f := range unbuilt() {
		if name := f.Names()[0]; c.IsSet(name) {
			out = append(out, fmt.Sprintf("flag --%s has no effect: this version of kiln doesn't have the feature", name))
		}
	}
	return out
}
