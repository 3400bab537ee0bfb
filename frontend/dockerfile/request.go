package dockerfile

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"path"
	"strconv"
	"strings"

	"github.com/containerd/platforms"
	"github.com/docker/go-units"
	"github.com/kilnbuild/kiln/client/llb"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tonistiigi/go-csvvalue"
)

// config is what the attributes of a request say. Attributes that only some
// kinds of request use are read where they are used.
type config struct {
	opts map[string]string

	filename       string
	target         string
	platforms      []ocispec.Platform // none: whatever the base image is
	buildPlatform  ocispec.Platform
	multiPlatform  bool
	buildArgs      map[string]string
	labels         map[string]string
	localSessions  map[string]string
	noCache        *[]string // nil: none; empty: all stages
	resolveMode    llb.ResolveMode
	extraHosts     []llb.HostIP
	ulimits        []*units.Ulimit
	shmSize        int64
	cgroupParent   string
	hostname       string
	network        pb.NetMode
	resources      *llb.LinuxResources
	cacheNamespace string
	cacheImports   []*gwpb.CacheOptionsEntry
	lint           *linter.Config // nil: as the Dockerfile says
	gitAdvice      bool
}

const (
	dockerfileName   = "Dockerfile"
	dockerignoreName = ".dockerignore"
	argPrefix        = "build-arg:"
)

// parseConfig reads the attributes. Errors name the attribute.
func parseConfig(opts map[string]string, workerPlatforms []ocispec.Platform) (*config, error) {
	if opts == nil {
		opts = map[string]string{}
	}
	c := &config{
		opts:           opts,
		filename:       dockerfileName,
		target:         opts["target"],
		buildArgs:      withPrefix(opts, argPrefix),
		labels:         withPrefix(opts, "label:"),
		localSessions:  withPrefix(opts, "local-sessionid:"),
		cgroupParent:   opts["cgroup-parent"],
		hostname:       firstOf(opts[argPrefix+"BUILDKIT_SANDBOX_HOSTNAME"], opts["hostname"]),
		cacheNamespace: opts[argPrefix+"BUILDKIT_CACHE_MOUNT_NS"],
		buildPlatform:  platforms.Normalize(platforms.DefaultSpec()),
	}
	if len(workerPlatforms) > 0 {
		c.buildPlatform = workerPlatforms[0]
	}
	if v, ok := opts["filename"]; ok {
		c.filename = v
	}
	if v, ok := opts["no-cache"]; ok {
		stages := []string{}
		if v != "" {
			stages = strings.Split(v, ",")
		}
		c.noCache = &stages
	}
	for _, a := range attributes {
		v := opts[a.name]
		if v == "" && !a.whenEmpty {
			continue
		}
		if _, ok := opts[a.name]; !ok {
			continue
		}
		if err := a.parse(c, v); err != nil {
			return nil, fmt.Errorf("attribute %s: %w", a.name, err)
		}
	}
	if err := c.checkRemoved(); err != nil {
		return nil, err
	}
	return c, c.parseMultiPlatform()
}

// attributes are those whose value has a form. Without whenEmpty, an empty one
// is as good as none.
var attributes = []struct {
	name      string
	whenEmpty bool
	parse     func(c *config, v string) error
}{
	{"platform", false, (*config).parsePlatforms},
	{"image-resolve-mode", false, (*config).parseResolveMode},
	{"add-hosts", false, (*config).parseExtraHosts},
	{"ulimit", false, (*config).parseUlimits},
	{"shm-size", false, (*config).parseShmSize},
	{"force-network-mode", false, (*config).parseNetwork},
	{"memory", false, limit(func(r *llb.LinuxResources) *int64 { return &r.Memory }, false)},
	{"memswap", false, limit(func(r *llb.LinuxResources) *int64 { return &r.MemorySwap }, true)},
	{"cpushares", false, limit(func(r *llb.LinuxResources) *uint64 { return &r.CPUShares }, false)},
	{"cpuperiod", false, limit(func(r *llb.LinuxResources) *uint64 { return &r.CPUPeriod }, false)},
	{"cpuquota", false, limit(func(r *llb.LinuxResources) *int64 { return &r.CPUQuota }, false)},
	{"cpusetcpus", false, cpuset(func(r *llb.LinuxResources) *string { return &r.CpusetCpus })},
	{"cpusetmems", false, cpuset(func(r *llb.LinuxResources) *string { return &r.CpusetMems })},
	{"cache-imports", false, (*config).parseCacheImports},
	{"cache-from", false, (*config).parseCacheFrom},
	{argPrefix + "BUILDKIT_DOCKERFILE_CHECK", true, (*config).parseLint},
	{argPrefix + "BUILDKIT_GIT_ADVICE", false, (*config).parseGitAdvice},
}

// withPrefix returns the attributes that begin with prefix, without it.
func withPrefix(opts map[string]string, prefix string) map[string]string {
	m := map[string]string{}
	for k, v := range opts {
		if name, ok := strings.CutPrefix(k, prefix); ok {
			m[name] = v
		}
	}
	return m
}

func firstOf(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}

// checkRemoved refuses attributes that once meant something.
func (c *config) checkRemoved() error {
	if c.opts["override-copy-image"] != "" {
		return errors.New("attribute override-copy-image: no longer supported")
	}
	if off, err := strconv.ParseBool(c.buildArgs["BUILDKIT_DISABLE_FILEOP"]); err == nil && off {
		return errors.New("build arg BUILDKIT_DISABLE_FILEOP: no longer supported")
	}
	return nil
}

func (c *config) parsePlatforms(v string) error {
	for name := range strings.SplitSeq(v, ",") {
		p, err := platforms.Parse(name)
		if err != nil {
			return fmt.Errorf("parse target platform %q: %w", name, err)
		}
		c.platforms = append(c.platforms, platforms.Normalize(p))
	}
	return nil
}

func (c *config) parseMultiPlatform() error {
	c.multiPlatform = len(c.platforms) > 1
	v := firstOf(c.buildArgs["BUILDKIT_MULTI_PLATFORM"], c.opts["multi-platform"])
	if v == "" {
		return nil
	}
	multi, err := strconv.ParseBool(v)
	if err != nil {
		return fmt.Errorf("attribute multi-platform: invalid boolean %q", v)
	}
	if !multi && len(c.platforms) > 1 {
		return fmt.Errorf("attribute multi-platform: false conflicts with the %d platforms asked for", len(c.platforms))
	}
	c.multiPlatform = multi
	return nil
}

func (c *config) parseResolveMode(v string) error {
	for _, m := range []llb.ResolveMode{llb.ResolveModeDefault, llb.ResolveModeForcePull, llb.ResolveModePreferLocal} {
		if v == m.String() {
			c.resolveMode = m
			return nil
		}
	}
	return fmt.Errorf("invalid mode %q: it is default, pull or local", v)
}

func (c *config) parseExtraHosts(v string) error {
	fields, err := csvvalue.Fields(v, nil)
	if err != nil {
		return err
	}
	for _, f := range fields {
		host, addr, ok := strings.Cut(strings.ToLower(f), "=")
		if !ok {
			return fmt.Errorf("invalid key-value pair %q", f)
		}
		ip := net.ParseIP(addr)
		if ip == nil {
			return fmt.Errorf("invalid IP address %q of host %s", addr, host)
		}
		c.extraHosts = append(c.extraHosts, llb.HostIP{Host: host, IP: ip})
	}
	return nil
}

func (c *config) parseUlimits(v string) error {
	fields, err := csvvalue.Fields(v, nil)
	if err != nil {
		return err
	}
	for _, f := range fields {
		u, err := units.ParseUlimit(f)
		if err != nil {
			return err
		}
		c.ulimits = append(c.ulimits, u)
	}
	return nil
}

func (c *config) parseShmSize(v string) (err error) {
	c.shmSize, err = strconv.ParseInt(v, 10, 64)
	return err
}

func (c *config) parseNetwork(v string) error {
	modes := map[string]pb.NetMode{"none": llb.NetModeNone, "host": llb.NetModeHost, "sandbox": llb.NetModeSandbox}
	mode, ok := modes[v]
	if !ok {
		return fmt.Errorf("invalid network mode %q: it is sandbox, host or none", v)
	}
	c.network = mode
	return nil
}

func (c *config) parseLint(v string) (err error) {
	c.lint, err = linter.ParseLintOptions(v)
	return err
}

func (c *config) parseGitAdvice(v string) (err error) {
	c.gitAdvice, err = strconv.ParseBool(v)
	return err
}

func (c *config) parseCacheImports(v string) error {
	var entries []struct {
		Type  string
		Attrs map[string]string
	}
	if err := json.Unmarshal([]byte(v), &entries); err != nil {
		return fmt.Errorf("parse %q: %w", v, err)
	}
	for _, e := range entries {
		c.cacheImports = append(c.cacheImports, &gwpb.CacheOptionsEntry{Type: e.Type, Attrs: e.Attrs})
	}
	return nil
}

// parseCacheFrom reads the older form of cache-imports.
func (c *config) parseCacheFrom(v string) error {
	for ref := range strings.SplitSeq(v, ",") {
		c.cacheImports = append(c.cacheImports, &gwpb.CacheOptionsEntry{
			Type:  "registry",
			Attrs: map[string]string{"ref": ref},
		})
	}
	return nil
}

// skipsCache reports whether a stage must run even if it is cached.
func (c *config) skipsCache(stage string) bool {
	if c.noCache == nil {
		return false
	}
	for _, name := range *c.noCache {
		if strings.EqualFold(name, stage) {
			return true
		}
	}
	return len(*c.noCache) == 0
}

// lowerName is the other spelling under which the Dockerfile is looked for, or
// "".
func (c *config) lowerName() string {
	if path.Base(c.filename) != dockerfileName {
		return ""
	}
	return path.Join(path.Dir(c.filename), strings.ToLower(dockerfileName))
}
