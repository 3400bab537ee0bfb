package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kilnbuild/kiln/executor"
	"github.com/kilnbuild/kiln/internal/rootless"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/worker"
	"github.com/pelletier/go-toml/v2"
	"github.com/urfave/cli/v3"
)

const (
	defaultGrace     = 10 * time.Second
	defaultUnclaimed = 5 * time.Minute
)

// config is what the daemon runs with: the file's keys, overridden by flags
// (DMN-023). The keys are those of buildkitd.toml.
type config struct {
	Root                 string   `toml:"root"`
	Debug                bool     `toml:"debug"`
	Trace                bool     `toml:"trace"`
	InsecureEntitlements []string `toml:"insecure-entitlements"`
	Log                  struct {
		Format string `toml:"format"`
		Level  string `toml:"level"`
	} `toml:"log"`
	GRPC struct {
		Address      []string `toml:"address"`
		DebugAddress string   `toml:"debugAddress"`
		UID          *int     `toml:"uid"`
		GID          *int     `toml:"gid"`
		TLS          struct {
			Cert string `toml:"cert"`
			Key  string `toml:"key"`
			CA   string `toml:"ca"`
		} `toml:"tls"`
	} `toml:"grpc"`
	DNS *struct {
		Nameservers   []string `toml:"nameservers"`
		Options       []string `toml:"options"`
		SearchDomains []string `toml:"searchDomains"`
	} `toml:"dns"`
	History struct {
		MaxAge     any `toml:"maxAge"` // read by parseDuration
		MaxEntries int `toml:"maxEntries"`
	} `toml:"history"`
	Cache struct {
		Verify float64 `toml:"verify"` // share of hits
	} `toml:"cache"`
	Kiln struct { // what buildkitd doesn't have; durations are read by parseDuration
		StepTimeout     any `toml:"stepTimeout"`
		NoOutputTimeout any `toml:"noOutputTimeout"`
		BuildTimeout    any `toml:"buildTimeout"`
		UnclaimedStep   any `toml:"unclaimedStepTimeout"`
		CancelGrace     any `toml:"cancelGrace"`

		StepMemory any     `toml:"stepMemory"` // read by parseMost
		StepCPUs   float64 `toml:"stepCPUs"`
		StepPids   int64   `toml:"stepPids"`

		RecordBuilds  string `toml:"recordBuilds"`  // a directory; "" records nothing
		MaxLogStorage any    `toml:"maxLogStorage"` // read by parseSpace
	} `toml:"kiln"`
	System struct {
		MaxRegistryConcurrency int `toml:"maxRegistryConcurrency"`
	} `toml:"system"`
	Worker struct {
		OCI struct {
			Labels              map[string]string `toml:"labels"`
			Platforms           []string          `toml:"platforms"`
			Snapshotter         string            `toml:"snapshotter"`
			Binary              string            `toml:"binary"`
			Rootless            bool              `toml:"rootless"`
			NetworkMode         string            `toml:"networkMode"`
			CNIConfigPath       string            `toml:"cniConfigPath"`
			CNIBinaryPath       string            `toml:"cniBinaryPath"`
			CNIPoolSize         *int              `toml:"cniPoolSize"`
			BridgeName          string            `toml:"bridgeName"`
			BridgeSubnet        string            `toml:"bridgeSubnet"`
			DefaultCgroupParent string            `toml:"defaultCgroupParent"`
			AppArmorProfile     string            `toml:"apparmor-profile"`
			NoProcessSandbox    bool              `toml:"noProcessSandbox"`
			MaxParallelism      int               `toml:"max-parallelism"`
			gcConfig
		} `toml:"oci"`
	} `toml:"worker"`
	Registry map[string]registryConfig `toml:"registry"`

	historyAge time.Duration // History.MaxAge, read
	gc         worker.GC     // of the OCI worker, read
	limits     ops.Limits    // those of Kiln, read
	maxLogs    int64         // Kiln.MaxLogStorage, read; bytes
	unclaimed  time.Duration // Kiln.UnclaimedStep, read
	cancel     time.Duration // Kiln.CancelGrace, read
	most       executor.Most // of steps, read

	// These have flags only.
	group    string
	idleExit time.Duration
	grace    time.Duration
}

type registryConfig struct {
	Mirrors      []string  `toml:"mirrors"`
	PlainHTTP    *bool     `toml:"http"`
	Insecure     *bool     `toml:"insecure"`
	RootCAs      []string  `toml:"ca"`
	KeyPairs     []keyPair `toml:"keypair"`
	TLSConfigDir []string  `toml:"tlsconfigdir"`
}

type keyPair struct {
	Key  string `toml:"key"`
	Cert string `toml:"cert"`
}

// parseDuration reads a Go duration or a number of seconds, quoted or not
// (DMN-048).
func parseDuration(key string, value any) (time.Duration, error) {
	text := fmt.Sprint(value)
	if _, err := strconv.ParseInt(text, 10, 64); err == nil {
		text += "s"
	}
	d, err := time.ParseDuration(text)
	switch {
	case err != nil:
		return 0, fmt.Errorf("%s: %q is neither a duration such as 48h nor a number of seconds", key, fmt.Sprint(value))
	case d < 0:
		return 0, fmt.Errorf("%s: %q is negative", key, text)
	}
	return d, nil
}

// loadConfig merges defaults, file and flags, in rising order of precedence.
func loadConfig(c *cli.Command) (*config, []string, error) {
	cfg := &config{}
	cfg.History.MaxAge, cfg.History.MaxEntries, cfg.Kiln.MaxLogStorage = "48h", 50, "1GB"
	paths := defaultPaths(c)
	warnings, err := cfg.readFile(cmp.Or(c.String("config"), paths.Config), c.IsSet("config"))
	if err != nil {
		return nil, nil, err
	}
	if v := c.String("oci-worker"); v != "auto" && !isTrue(v) {
		return nil, nil, fmt.Errorf("--oci-worker %s: the OCI worker is the only one there is; auto or true", c.String("oci-worker"))
	}
	cfg.applyFlags(c)
	cfg.Root = cmp.Or(cfg.Root, paths.Root)
	if len(cfg.GRPC.Address) == 0 {
		cfg.GRPC.Address = []string{paths.Address}
	}
	more, err := cfg.Worker.OCI.gcConfig.applyFlags(c)
	if err != nil {
		return nil, nil, err
	}
	warnings = slices.Concat(warnings, more, unbuiltWarnings(c))
	return cfg, warnings, cfg.check()
}

// defaultPaths are a user's own with --rootless, and where an ordinary user
// started the daemon.
func defaultPaths(c *cli.Command) rootless.Paths {
	if c.Bool("rootless") {
		return rootless.User()
	}
	return rootless.Defaults()
}

// readFile reads the config file. The default one may be missing.
func (cfg *config) readFile(path string, explicit bool) (warnings []string, err error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && !explicit {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read config: %w", err)
	}
	var tree map[string]any
	if err := toml.Unmarshal(data, &tree); err != nil {
		return nil, fmt.Errorf("config %s: %w", path, describeTOML(err))
	}
	if warnings, err = checkKeys(tree); err != nil {
		return nil, fmt.Errorf("config %s: %w", path, err)
	}
	if err := toml.Unmarshal(data, cfg); err != nil {
		return nil, fmt.Errorf("config %s: %w", path, describeTOML(err))
	}
	return warnings, nil
}

func describeTOML(err error) error {
	if de, ok := errors.AsType[*toml.DecodeError](err); ok {
		row, col := de.Position()
		return fmt.Errorf("line %d, column %d: %w", row, col, err)
	}
	return err
}

// applyFlags lets flags that were set override the file; the others give what
// neither sets its default.
func (cfg *config) applyFlags(c *cli.Command) {
	str := func(dst *string, name string) {
		if c.IsSet(name) || *dst == "" {
			*dst = c.String(name)
		}
	}
	list := func(dst *[]string, name string) {
		if c.IsSet(name) || len(*dst) == 0 {
			*dst = c.StringSlice(name)
		}
	}
	oci := &cfg.Worker.OCI
	str(&cfg.Root, "root")
	str(&cfg.GRPC.DebugAddress, "debugaddr")
	str(&cfg.Log.Level, "log-level")
	str(&cfg.Log.Format, "log-format")
	str(&cfg.GRPC.TLS.Cert, "tlscert")
	str(&cfg.GRPC.TLS.Key, "tlskey")
	str(&cfg.GRPC.TLS.CA, "tlscacert")
	str(&oci.Snapshotter, "oci-worker-snapshotter")
	str(&oci.Binary, "oci-worker-binary")
	str(&oci.AppArmorProfile, "oci-worker-apparmor-profile")
	str(&oci.NetworkMode, "oci-worker-net")
	str(&oci.CNIConfigPath, "oci-cni-config-path")
	str(&oci.CNIBinaryPath, "oci-cni-binary-dir")
	str(&cfg.Kiln.RecordBuilds, "record-builds")
	list(&cfg.GRPC.Address, "addr")
	list(&cfg.InsecureEntitlements, "allow-insecure-entitlement")
	list(&oci.Platforms, "oci-worker-platform")
	if c.IsSet("oci-cni-pool-size") {
		size := c.Int("oci-cni-pool-size")
		oci.CNIPoolSize = &size
	}
	if c.IsSet("oci-max-parallelism") {
		oci.MaxParallelism = c.Int("oci-max-parallelism")
	}
	for name, dst := range map[string]*bool{"oci-worker-rootless": &oci.Rootless, "oci-worker-no-process-sandbox": &oci.NoProcessSandbox} {
		if c.IsSet(name) {
			*dst = c.Bool(name)
		}
	}
	if c.IsSet("cache-verify") {
		cfg.Cache.Verify = c.Float("cache-verify")
	}
	for _, kv := range c.StringSlice("oci-worker-labels") {
		if oci.Labels == nil {
			oci.Labels = map[string]string{}
		}
		k, v, _ := strings.Cut(kv, "=")
		oci.Labels[k] = v
	}
	for name, key := range map[string]*any{"step-timeout": &cfg.Kiln.StepTimeout, "no-output-timeout": &cfg.Kiln.NoOutputTimeout, "build-timeout": &cfg.Kiln.BuildTimeout,
		"unclaimed-step-timeout": &cfg.Kiln.UnclaimedStep, "cancel-grace": &cfg.Kiln.CancelGrace} {
		if c.IsSet(name) || *key == nil {
			*key = c.Duration(name)
		}
	}
	if c.IsSet("step-memory") {
		cfg.Kiln.StepMemory = c.String("step-memory")
	}
	if c.IsSet("step-cpus") {
		cfg.Kiln.StepCPUs = c.Float("step-cpus")
	}
	if c.IsSet("step-pids") {
		cfg.Kiln.StepPids = c.Int64("step-pids")
	}
	cfg.group, cfg.idleExit, cfg.grace = c.String("group"), c.Duration("idle-exit"), c.Duration("grace")
	if c.Bool("debug") || c.Bool("trace") || cfg.Debug || cfg.Trace {
		cfg.Log.Level = "debug"
	}
}

func isTrue(text string) bool {
	b, err := strconv.ParseBool(text)
	return err == nil && b
}

// check refuses values that can't be meant.
func (cfg *config) check() error {
	for _, e := range cfg.InsecureEntitlements {
		if !slices.Contains([]string{"network.host", "security.insecure", "device"}, e) {
			return fmt.Errorf("entitlement %q: must be network.host, security.insecure or device", e)
		}
	}
	oci := cfg.Worker.OCI
	switch {
	case !slices.Contains([]string{"auto", "overlayfs"}, oci.Snapshotter):
		return fmt.Errorf("snapshotter %q: this daemon has overlayfs only", oci.Snapshotter)
	case oci.MaxParallelism < 0:
		return fmt.Errorf("max-parallelism is negative: %d", oci.MaxParallelism)
	case !(cfg.Cache.Verify >= 0 && cfg.Cache.Verify <= 1): // nor is NaN
		return fmt.Errorf("cache verify %v (--cache-verify, [cache] verify): must be a share of the hits from 0 to 1, such as 0.1", cfg.Cache.Verify)
	case cfg.History.MaxEntries < 0:
		return fmt.Errorf("history.maxEntries is negative: %d", cfg.History.MaxEntries)
	case cfg.idleExit < 0 || cfg.grace < 0:
		return fmt.Errorf("--idle-exit %s, --grace %s: a duration is negative", cfg.idleExit, cfg.grace)
	case cfg.GRPC.TLS.CA != "" && cfg.GRPC.TLS.Cert == "":
		return errors.New("--tlscacert needs --tlscert and --tlskey: without TLS it would check nobody")
	case (cfg.GRPC.TLS.Cert == "") != (cfg.GRPC.TLS.Key == ""):
		return errors.New("TLS needs both a certificate and a key (--tlscert, --tlskey)")
	}
	if err := cfg.network().Check(); err != nil {
		return fmt.Errorf("worker.oci: %w", err)
	}
	var err error
	if cfg.most, err = cfg.parseMost(); err != nil {
		return err
	}
	if cfg.gc, err = cfg.Worker.OCI.gcConfig.read("worker.oci"); err != nil {
		return err
	}
	if cfg.maxLogs, err = parseBytes("kiln.maxLogStorage", cfg.Kiln.MaxLogStorage); err != nil {
		return err
	}
	for _, d := range []struct {
		key   string
		value any
		read  *time.Duration
	}{
		{"history.maxAge", cfg.History.MaxAge, &cfg.historyAge},
		{"kiln.stepTimeout", cfg.Kiln.StepTimeout, &cfg.limits.Step},
		{"kiln.noOutputTimeout", cfg.Kiln.NoOutputTimeout, &cfg.limits.Quiet},
		{"kiln.buildTimeout", cfg.Kiln.BuildTimeout, &cfg.limits.Build},
		{"kiln.unclaimedStepTimeout", cfg.Kiln.UnclaimedStep, &cfg.unclaimed},
		{"kiln.cancelGrace", cfg.Kiln.CancelGrace, &cfg.cancel},
	} {
		if *d.read, err = parseDuration(d.key, d.value); err != nil {
			return err
		}
	}
	return nil
}
