package dockerfile

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/kilnbuild/kiln/client/llb"
	"github.com/kilnbuild/kiln/frontend"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/buildkit/solver/pb"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

const scratchName = "scratch"

// resolveBases finds out what every stage that the target needs starts from.
// Triggers of base images may need further stages, so it goes on until there
// are none.
func (c *conversion) resolveBases(ctx context.Context) error {
	for {
		needed := c.needed()
		eg, egctx := errgroup.WithContext(ctx)
		for _, s := range needed {
			if s.base != nil || s.resolved {
				continue
			}
			s.resolved = true
			eg.Go(func() error {
				err := c.resolveBase(egctx, s)
				if err != nil && errors.Is(err, context.Cause(egctx)) {
					return err // of whatever failed first, located there
				}
				return parser.WithLocation(err, s.src.Location)
			})
		}
		if err := eg.Wait(); err != nil {
			return err
		}
		more := false
		for _, s := range needed {
			added, err := c.addTriggers(s)
			if err != nil {
				return parser.SetLocation(err, s.src.Location)
			}
			more = more || added
		}
		if !more {
			return nil
		}
	}
}

// resolveBase sets the state, image and platform that s starts with.
func (c *conversion) resolveBase(ctx context.Context, s *stage) error {
	if s.context != nil {
		return c.loadStageContext(ctx, s)
	}
	name := s.src.BaseName
	if name == scratchName {
		s.state = llb.Scratch()
		s.image = emptyImage(c.target)
		s.platform = &c.target
		return nil
	}
	ref, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return fmt.Errorf("failed to parse stage name %q: %w", name, err)
	}
	platform := s.platform
	if platform == nil {
		platform = &c.target
	}
	nc, err := c.namedContext(reference.TagNameOnly(ref).String(), platform, s.used)
	if err != nil {
		return err
	}
	if nc != nil {
		return c.loadBaseContext(ctx, s, nc, *platform)
	}
	return c.loadBaseImage(ctx, s, ref, *platform)
}

// loadStageContext makes s what the named context of its name is.
func (c *conversion) loadStageContext(ctx context.Context, s *stage) error {
	st, img, err := s.context.load(ctx)
	if err != nil {
		return err
	}
	s.state, s.ready = st, true
	if img == nil {
		return nil
	}
	s.image = img.clone()
	s.image.Created = nil
	if img.Architecture != "" && img.OS != "" {
		p := img.Platform
		s.platform = &p
	}
	return nil
}

// loadBaseContext starts s from the named context of its base.
func (c *conversion) loadBaseContext(ctx context.Context, s *stage, nc *namedContext, platform ocispec.Platform) error {
	st, img, err := nc.load(ctx)
	if err != nil {
		return err
	}
	if img == nil {
		empty := emptyImage(platform)
		img = &empty
	}
	base := img.clone()
	s.baseImage = &base
	s.image = img.clone()
	s.image.Created = nil
	s.state = st.Platform(platform)
	s.platform = &platform
	return nil
}

// loadBaseImage starts s from an image of a registry.
func (c *conversion) loadBaseImage(ctx context.Context, s *stage, ref reference.Named, platform ocispec.Platform) error {
	name := reference.TagNameOnly(ref)
	prefix := "[internal]"
	if c.cfg.multiPlatform {
		prefix = "[" + platforms.FormatAll(platform) + " internal]"
	}
	meta, err := c.metas.resolve(ctx, imageSource(name), frontend.MetaOptions{
		LogName:     fmt.Sprintf("%s load metadata for %s", prefix, name),
		Platform:    &platform,
		ResolveMode: c.cfg.resolveMode.String(),
	})
	if err != nil {
		err = fmt.Errorf("%s: %w", s.src.BaseName, err)
		return suggest(err, s.src.BaseName, append(c.stageNames(), commonImages()...))
	}
	resolved, isImage := resolvedImage(meta)
	if !isImage {
		return fmt.Errorf("%s: the source policy replaces the base image by %s, which is no image", s.src.BaseName, meta.Op.Identifier)
	}
	if ref, err = reference.ParseNormalizedNamed(resolved); err != nil {
		return fmt.Errorf("failed to parse ref %q: %w", resolved, err)
	}
	img, err := parseImage(meta.Config)
	if err != nil {
		return fmt.Errorf("%s: %w", s.src.BaseName, err)
	}
	base := img.clone()
	s.baseImage = &base
	s.image = img.clone()
	s.image.Created = nil
	if s.platform == nil && c.implicit {
		platform = detectPlatform(img.Platform, platform, c.cfg.buildPlatform)
	}
	s.platform = &platform
	if meta.Digest != "" {
		digested, err := reference.WithDigest(ref, meta.Digest)
		if err != nil {
			return fmt.Errorf("%s: %w", s.src.BaseName, err)
		}
		ref = digested
	}
	if !img.hasLayers() {
		s.state = llb.Scratch()
		return nil
	}
	s.warnings = append(s.warnings, func() { c.lintBasePlatform(s, platform, img.Platform) })
	s.state = llb.Image(ref.String(),
		description(s.src.SourceCode),
		llb.Platform(platform),
		c.cfg.resolveMode,
		llb.WithCustomName(s.vertexName("FROM "+ref.String(), &platform, llb.EnvList{})),
		c.location(s.src.Location),
	)
	return nil
}

// detectPlatform is the platform of an image that was asked for without one: a
// supported one if the image is for it.
func detectPlatform(img, target, supported ocispec.Platform) ocispec.Platform {
	same := func(p ocispec.Platform) bool { return p.OS == img.OS && p.Architecture == img.Architecture }
	if !same(target) && same(supported) {
		return supported
	}
	return target
}

// lintBasePlatform warns of a base image that is for another platform.
func (c *conversion) lintBasePlatform(s *stage, want, got ocispec.Platform) {
	if want.OS == got.OS && want.Architecture == got.Architecture {
		return
	}
	rule := &linter.RuleInvalidBaseImagePlatform
	c.lint.Run(rule, s.src.Location, rule.Format(s.src.BaseName,
		platforms.FormatAll(platforms.Normalize(want)), platforms.FormatAll(platforms.Normalize(got))))
}

func imageSource(ref reference.Named) *pb.SourceOp {
	return &pb.SourceOp{Identifier: "docker-image://" + ref.String()}
}

// resolvedImage is the reference that a policy left of an image, if it is one
// still.
func resolvedImage(meta *frontend.SourceMeta) (string, bool) {
	return strings.CutPrefix(meta.Op.GetIdentifier(), "docker-image://")
}

// metaCache asks for each source once per build, whatever asks for it.
type metaCache struct {
	bridge frontend.Bridge
	mu     sync.Mutex // guards calls; not held while one is made
	calls  map[string]*metaCall
}

type metaCall struct {
	done chan struct{} // closed when the fields below are set
	meta *frontend.SourceMeta
	err  error
}

func (m *metaCache) resolve(ctx context.Context, op *pb.SourceOp, opt frontend.MetaOptions) (*frontend.SourceMeta, error) {
	key := op.Identifier + "\x00" + opt.LogName + "\x00" + opt.ResolveMode
	if opt.Platform != nil {
		key += "\x00" + platforms.FormatAll(*opt.Platform)
	}
	m.mu.Lock()
	call, running := m.calls[key]
	if !running {
		call = &metaCall{done: make(chan struct{})}
		if m.calls == nil {
			m.calls = map[string]*metaCall{}
		}
		m.calls[key] = call
	}
	m.mu.Unlock()
	if !running {
		call.meta, call.err = m.bridge.ResolveSourceMeta(ctx, op, opt)
		if call.err == nil && call.meta.Op == nil {
			call.meta.Op = op
		}
		close(call.done)
	}
	select {
	case <-call.done:
		return call.meta, call.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}
