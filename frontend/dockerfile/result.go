package dockerfile

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"

	"github.com/containerd/platforms"
	"github.com/kilnbuild/kiln/frontend"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// Keys of the result's metadata. With several platforms, "/" and the
// platform's id follow.
const (
	configKey     = "containerimage.config"
	baseConfigKey = "containerimage.base.config"
	epochKey      = "source.date.epoch"
	platformsKey  = "refs.platforms"
)

// platformList is the value of platformsKey.
type platformList struct {
	Platforms []resultPlatform
}

type resultPlatform struct {
	ID       string
	Platform ocispec.Platform
}

// platformResult is what the Dockerfile makes for one platform.
type platformResult struct {
	ref        frontend.Ref
	conversion *conversion
	platform   resultPlatform
}

// solvePlatforms converts the Dockerfile for every platform at once and lays
// out the results.
func (b *build) solvePlatforms(ctx context.Context) (*frontend.Result, error) {
	targets := make([]*ocispec.Platform, max(1, len(b.cfg.platforms)))
	for i := range b.cfg.platforms {
		targets[i] = &b.cfg.platforms[i]
	}
	results := make([]platformResult, len(targets))

	eg, egctx := errgroup.WithContext(ctx)
	for i, target := range targets {
		eg.Go(func() (err error) {
			opt := convertOptions{platform: target}
			if i == 0 {
				opt.warn = b.showWarning(ctx)
			}
			results[i], err = b.solvePlatform(egctx, opt)
			return err
		})
	}
	if err := eg.Wait(); err != nil {
		return nil, err
	}
	return b.layout(results)
}

func (b *build) solvePlatform(ctx context.Context, opt convertOptions) (platformResult, error) {
	c, err := b.convert(ctx, opt)
	if err != nil {
		return platformResult{}, err
	}
	def, err := c.result.state.Marshal(c.marshalOptions()...)
	if err != nil {
		return platformResult{}, fmt.Errorf("failed to marshal LLB definition: %w", err)
	}
	ref, err := b.solveDefinition(ctx, frontend.SolveRequest{Definition: def, CacheImports: b.cfg.cacheImports})
	if err != nil {
		return platformResult{}, err
	}
	return platformResult{ref: ref, conversion: c, platform: exportPlatform(c.target, c.result.image.Platform)}, nil
}

// exportPlatform is the platform as the result names it. Windows images tell
// which version they are for.
func exportPlatform(p, img ocispec.Platform) resultPlatform {
	p = normalize(p)
	out := resultPlatform{ID: platforms.FormatAll(p)}
	if p.OS == "windows" && img.OS == p.OS {
		if p.OSVersion == "" {
			p.OSVersion = img.OSVersion
		}
		if p.OSFeatures == nil {
			p.OSFeatures = img.OSFeatures
		}
		p = normalize(p)
	}
	out.Platform = p
	return out
}

func (b *build) layout(results []platformResult) (*frontend.Result, error) {
	res := &frontend.Result{Metadata: map[string][]byte{}}
	var list platformList
	for _, r := range results {
		list.Platforms = append(list.Platforms, r.platform)
		suffix := ""
		if b.cfg.multiPlatform {
			suffix = "/" + r.platform.ID
			if res.Refs == nil {
				res.Refs = map[string]frontend.Ref{}
			}
			res.Refs[r.platform.ID] = r.ref
		} else {
			res.Ref = r.ref
		}
		s := r.conversion.result
		config, err := json.Marshal(s.image)
		if err != nil {
			return nil, fmt.Errorf("encode image config: %w", err)
		}
		res.Metadata[configKey+suffix] = config
		if s.baseImage != nil {
			if res.Metadata[baseConfigKey+suffix], err = json.Marshal(s.baseImage); err != nil {
				return nil, fmt.Errorf("encode config of base image: %w", err)
			}
		}
		if e := r.conversion.epoch; e != nil {
			res.Metadata[epochKey+suffix] = strconv.AppendInt(nil, e.Unix(), 10)
		}
	}
	var err error
	if res.Metadata[platformsKey], err = json.Marshal(list); err != nil {
		return nil, fmt.Errorf("encode platforms: %w", err)
	}
	return res, nil
}
