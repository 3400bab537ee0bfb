package dockerfile

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/kilnbuild/kiln/client/llb"
	"github.com/kilnbuild/kiln/frontend"
	"github.com/moby/buildkit/solver/pb"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// namedContext is a context that the request gives a name. It stands in for the
// stage or image of that name.
type namedContext struct {
	b        *build
	name     string
	key      string // the name as the request has it, maybe with a platform
	input    string // such as docker-image://alpine
	platform *ocispec.Platform
	used     *pathSet // of a local directory
}

// maxRedirects bounds how often a source policy may replace a context.
const maxRedirects = 10

// namedContext returns the context called name, or nil. One for the platform is
// preferred.
func (b *build) namedContext(name string, platform *ocispec.Platform, used *pathSet) (*namedContext, error) {
	if strings.EqualFold(name, "scratch") || strings.EqualFold(name, "context") {
		return nil, nil
	}
	ref, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return nil, fmt.Errorf("invalid context name %s: %w", name, err)
	}
	name = strings.TrimSuffix(reference.FamiliarString(ref), ":latest")
	p := b.cfg.buildPlatform
	if platform != nil {
		p = *platform
	}
	for _, key := range []string{name + "::" + platforms.FormatAll(platforms.Normalize(p)), name} {
		if input, ok := b.cfg.opts["context:"+key]; ok {
			return &namedContext{b: b, name: name, key: key, input: input, platform: platform, used: used}, nil
		}
	}
	return nil, nil
}

// load returns the context and, if it is known, its image config.
func (nc *namedContext) load(ctx context.Context) (llb.State, *image, error) {
	input := nc.input
	for range maxRedirects {
		st, img, redirect, err := nc.loadInput(ctx, input)
		if err != nil || redirect == "" {
			return st, img, err
		}
		input = redirect
	}
	return llb.State{}, nil, fmt.Errorf("context %s: replaced more than %d times, last by %s; do the source policies form a circle?",
		nc.key, maxRedirects, input)
}

func (nc *namedContext) loadInput(ctx context.Context, input string) (_ llb.State, _ *image, redirect string, err error) {
	kind, rest, ok := strings.Cut(input, ":")
	if !ok {
		return llb.State{}, nil, "", fmt.Errorf("invalid context specifier %s for %s", input, nc.key)
	}
	if strings.HasPrefix(kind, "git@") {
		kind = "git"
	}
	var st llb.State
	var img *image
	switch kind {
	case "docker-image":
		return nc.loadImage(ctx, strings.TrimPrefix(rest, "//"))
	case "oci-layout":
		st, img, err = nc.loadLayout(ctx, strings.TrimPrefix(rest, "//"))
	case "git", "http", "https":
		st, err = nc.loadRemote(kind, input)
	case "local":
		st, err = nc.loadLocal(ctx, rest)
	case "input":
		st, img, err = nc.loadFrontendInput(rest)
	default:
		err = fmt.Errorf("unsupported context source %s for %s", kind, nc.key)
	}
	return st, img, "", err
}

func (nc *namedContext) customName(s string) llb.ConstraintsOpt {
	return llb.WithCustomName("[context " + nc.key + "] " + s)
}

func (nc *namedContext) loadImage(ctx context.Context, ref string) (_ llb.State, _ *image, redirect string, _ error) {
	if ref == scratchName {
		return llb.Scratch(), nil, "", nil
	}
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return llb.State{}, nil, "", fmt.Errorf("context %s: %w", nc.key, err)
	}
	meta, err := nc.b.metas.resolve(ctx, imageSource(reference.TagNameOnly(named)), frontend.MetaOptions{
		LogName:     fmt.Sprintf("[context %s] load metadata for %s", nc.key, ref),
		Platform:    nc.platform,
		ResolveMode: nc.b.cfg.resolveMode.String(),
	})
	if err != nil {
		return llb.State{}, nil, "", err
	}
	resolved, isImage := resolvedImage(meta)
	if !isImage {
		return llb.State{}, nil, meta.Op.Identifier, nil
	}
	opts := []llb.ImageOption{nc.customName(ref)}
	if nc.platform != nil {
		opts = append(opts, llb.Platform(*nc.platform))
	}
	st, img, err := withConfig(llb.Image(resolved, opts...), meta.Config)
	if err != nil {
		return llb.State{}, nil, "", fmt.Errorf("context %s: %w", nc.key, err)
	}
	img.Created = nil
	return st, img, "", nil
}

// loadLayout takes an image from an OCI layout of the client.
func (nc *namedContext) loadLayout(ctx context.Context, spec string) (llb.State, *image, error) {
	fail := func(err error) (llb.State, *image, error) {
		return llb.State{}, nil, fmt.Errorf("oci-layout reference %q of context %s: %w", spec, nc.key, err)
	}
	ref, err := reference.Parse(spec)
	if err != nil {
		return fail(err)
	}
	store, ok := ref.(reference.Named)
	if !ok {
		return fail(errors.New("it has no name"))
	}
	digested, ok := ref.(reference.Digested)
	if !ok {
		return fail(errors.New("it has no digest"))
	}
	// The image is shown under the context's name: the store's says little.
	shown, err := reference.ParseNormalizedNamed(nc.name)
	if err != nil {
		return fail(err)
	}
	shownDigest, err := reference.WithDigest(shown, digested.Digest())
	if err != nil {
		return fail(err)
	}
	session := nc.b.req.SessionID
	meta, err := nc.b.metas.resolve(ctx, &pb.SourceOp{
		Identifier: "oci-layout://" + shownDigest.String(),
		Attrs:      map[string]string{pb.AttrOCILayoutSessionID: session, pb.AttrOCILayoutStoreID: store.Name()},
	}, frontend.MetaOptions{
		LogName:  fmt.Sprintf("[context %s] load metadata for %s", nc.key, shownDigest),
		Platform: nc.platform,
	})
	if err != nil {
		return llb.State{}, nil, err
	}
	opts := []llb.OCILayoutOption{nc.customName("OCI load from client"), llb.OCIStore(session, store.Name())}
	if nc.platform != nil {
		opts = append(opts, llb.Platform(*nc.platform))
	}
	st, img, err := withConfig(llb.OCILayout(shownDigest.String(), opts...), meta.Config)
	if err != nil {
		return fail(err)
	}
	return st, img, nil
}

func (nc *namedContext) loadRemote(kind, url string) (llb.State, error) {
	repo, err := llb.ParseGitRepo(url)
	switch {
	case err == nil:
		opts := gitOptions(repo, nc.b.cfg.gitAdvice)
		return llb.Git(repo.Remote, "", append(opts, internalName("load git source "+url))...), nil
	case !errors.Is(err, llb.ErrNotGit):
		return llb.State{}, fmt.Errorf("context %s: %w", nc.key, err)
	case kind == "git":
		return llb.State{}, fmt.Errorf("invalid git context %s: %w", url, err)
	}
	return llb.HTTP(url, llb.Filename(httpContextFile), nc.customName(url)), nil
}

// loadLocal takes a directory of the client, reduced to what its own ignore
// file leaves and to the paths that turn out to be used.
func (nc *namedContext) loadLocal(ctx context.Context, local string) (llb.State, error) {
	session := nc.b.session(local)
	excludes, err := nc.b.readIgnore(ctx, llb.Local(local,
		llb.SessionID(session),
		llb.FollowPaths([]string{dockerignoreName}),
		llb.SharedKeyHint("context:"+nc.key+"-"+dockerignoreName),
		nc.customName("load "+dockerignoreName),
		llb.Differ(llb.DiffNone, false),
	))
	if err != nil {
		return llb.State{}, fmt.Errorf("context %s: %w", nc.key, err)
	}
	sharedKey := "context:" + nc.key + "-" + nc.b.cfg.opts["sharedkey:localdir:"+nc.key]
	return llb.Defer(func() (llb.State, error) {
		return llb.Local(local,
			nc.customName("load from client"),
			llb.SessionID(session),
			llb.SharedKeyHint(sharedKey),
			llb.ExcludePatterns(excludes),
			llb.FollowPaths(nc.used.list()),
		), nil
	}), nil
}

func (nc *namedContext) loadFrontendInput(name string) (llb.State, *image, error) {
	def, ok := nc.b.req.Inputs[name]
	if !ok {
		return llb.State{}, nil, fmt.Errorf("invalid input %s for %s: the request has no input of that name", name, nc.key)
	}
	st, err := llb.FromDefinition(def)
	if err != nil {
		return llb.State{}, nil, fmt.Errorf("input %s for %s: %w", name, nc.key, err)
	}
	attr := "input-metadata:" + name
	v, ok := nc.b.cfg.opts[attr]
	if !ok {
		return st, nil, nil
	}
	var md map[string][]byte
	if err := json.Unmarshal([]byte(v), &md); err != nil {
		return llb.State{}, nil, fmt.Errorf("attribute %s: parse %q: %w", attr, v, err)
	}
	config, ok := md[configKey]
	if !ok {
		return st, nil, nil
	}
	st, img, err := withConfig(st, config)
	if err != nil {
		return llb.State{}, nil, fmt.Errorf("attribute %s: %w", attr, err)
	}
	return st, img, nil
}

// withConfig gives st what an image config says and returns the config.
func withConfig(st llb.State, config []byte) (llb.State, *image, error) {
	img, err := parseImage(config)
	if err != nil {
		return llb.State{}, nil, err
	}
	st, err = st.WithImageConfig(config)
	return st, img, err
}
