package client

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	contentlocal "github.com/containerd/containerd/v2/plugins/content/local"
	control "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/session"
	sessioncontent "github.com/moby/buildkit/session/content"
	"github.com/moby/buildkit/session/filesync"
	"github.com/moby/buildkit/session/grpchijack"
	"github.com/moby/buildkit/solver/pb"
	spb "github.com/moby/buildkit/sourcepolicy/pb"
	"github.com/tonistiigi/fsutil"
	fstypes "github.com/tonistiigi/fsutil/types"
	"golang.org/x/sync/errgroup"
)

// Export is one output of a build. For archives (oci, docker, tar) Output opens
// where the bytes go; for local, OutputDir is where the files go.
type Export struct {
	Type      string
	Attrs     map[string]string
	Output    func(md map[string]string) (io.WriteCloser, error)
	OutputDir string
}

// SolveOptions are a build: either Definition, or a Frontend and what it needs.
type SolveOptions struct {
	Ref        string // "" is a random one
	Definition *pb.Definition
	Frontend   string
	Attrs      map[string]string
	Inputs     map[string]*pb.Definition
	Exports    []Export
	// CacheImports are asked beside the daemon's own cache; CacheExports are where
	// it is kept for others.
	CacheImports, CacheExports []Cache
	// Locals are directories by the name that the build knows them by;
	// OCILayouts are OCI layout directories likewise.
	Locals       map[string]string
	OCILayouts   map[string]string
	Entitlements []string
	// SourcePolicy says which sources the build may use; nil is any.
	SourcePolicy *spb.Policy
	// Attachables serve more in the session: secrets, SSH agents, credentials.
	Attachables []session.Attachable
	// SharedKey makes transfers of Locals incremental across builds with the
	// same one.
	SharedKey string
}

// Response is what exporters and the frontend say of the result.
type Response map[string]string

// Status is a message of the build's progress; receivers see all of them, in
// order.
type Status func(*control.StatusResponse)

// Solve runs a build to its end. status, which may be nil, is called from one
// goroutine. When ctx ends, the build is cancelled and the error is the cause.
func (c *Client) Solve(ctx context.Context, opts SolveOptions, status Status) (Response, error) {
	return c.build(ctx, opts, nil, status)
}

// build is Solve, or Build if drive isn't nil.
func (c *Client) build(ctx context.Context, opts SolveOptions, drive Drive, status Status) (Response, error) {
	if opts.Ref == "" {
		opts.Ref = rand.Text()
	}
	if err := opts.resolveImports(); err != nil {
		return nil, err
	}
	s, err := newSession(ctx, opts)
	if err != nil {
		return nil, err
	}
	eg, egctx := errgroup.WithContext(ctx)
	eg.Go(func() error {
		if err := s.Run(egctx, grpchijack.Dialer(c.control)); err != nil {
			return fmt.Errorf("session with %s: %w", c.addr, err)
		}
		return nil
	})
	var resp *control.SolveResponse
	solved := make(chan struct{})
	eg.Go(func() (err error) {
		defer s.Close()
		defer close(solved)
		req := opts.request(s.ID())
		if drive != nil {
			req.Definition, req.Frontend, req.FrontendInputs = nil, "", nil
		}
		resp, err = c.control.Solve(egctx, req)
		if err != nil {
			return fmt.Errorf("solve: %w", err)
		}
		return nil
	})
	if drive != nil {
		eg.Go(func() error { return c.Gateway(opts.Ref).drive(egctx, drive) })
	}
	if status != nil {
		eg.Go(func() error { return c.follow(ctx, opts.Ref, solved, status) })
	}
	if err := eg.Wait(); err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("build %s: %w", opts.Ref, context.Cause(ctx))
		}
		return nil, err
	}
	return resp.ExporterResponse, opts.tagCaches(resp.ExporterResponse)
}

// statusQuiet is how long the status of a build that has ended may say nothing
// before it is taken to be over (BCL-044).
const statusQuiet = 3 * time.Second

// follow passes on the status of a build, also of one that fails: it ends when
// the daemon ends the status, when nothing comes any more after the build, or
// with ctx.
func (c *Client) follow(ctx context.Context, ref string, solved <-chan struct{}, status Status) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	over := make(chan struct{})
	news := make(chan struct{}, 1)
	var err error
	go func() {
		defer close(over)
		err = c.Status(ctx, ref, func(msg *control.StatusResponse) {
			status(msg)
			select {
			case news <- struct{}{}:
			default:
			}
		})
	}()
	select {
	case <-over:
		return err
	case <-solved:
	}
	quiet := time.NewTimer(statusQuiet)
	defer quiet.Stop()
	for {
		select {
		case <-over:
			return err
		case <-news:
			quiet.Reset(statusQuiet)
		case <-quiet.C:
			cancel(errQuiet)
			<-over
			return nil
		}
	}
}

var errQuiet = errors.New("the build has ended and its status says no more")

func (opts SolveOptions) request(sessionID string) *control.SolveRequest {
	req := &control.SolveRequest{
		Ref: opts.Ref, Definition: opts.Definition, Session: sessionID, Frontend: opts.Frontend,
		FrontendAttrs: opts.Attrs, FrontendInputs: opts.Inputs, Entitlements: opts.Entitlements,
		Cache: opts.cacheOptions(), SourcePolicy: opts.SourcePolicy,
	}
	for _, ex := range opts.Exports {
		req.Exporters = append(req.Exporters, &control.Exporter{Type: ex.Type, Attrs: ex.Attrs})
	}
	return req
}

// Status calls status for every message of the build named ref, from its
// beginning to its end.
func (c *Client) Status(ctx context.Context, ref string, status Status) error {
	stream, err := c.control.Status(ctx, &control.StatusRequest{Ref: ref})
	if err != nil {
		return fmt.Errorf("status of build %s: %w", ref, err)
	}
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("status of build %s: %w", ref, err)
		}
		status(msg)
	}
}

// newSession prepares the services that the daemon may call.
func newSession(ctx context.Context, opts SolveOptions) (*session.Session, error) {
	s, err := session.NewSession(ctx, opts.SharedKey)
	if err != nil {
		return nil, fmt.Errorf("make session: %w", err)
	}
	dirs := filesync.StaticDirSource{}
	for name, dir := range opts.Locals {
		if dirs[name], err = openLocal(dir); err != nil {
			return nil, fmt.Errorf("local %s: %w", name, err)
		}
	}
	if len(dirs) > 0 {
		s.Allow(filesync.NewFSSyncProvider(dirs))
	}
	var targets []filesync.FSSyncTarget
	for i, ex := range opts.Exports {
		switch {
		case ex.Output != nil && ex.OutputDir != "":
			return nil, fmt.Errorf("export %d (%s): both a file and a directory are given", i, ex.Type)
		case ex.Output != nil:
			targets = append(targets, filesync.WithFSSync(i, ex.Output))
		case ex.OutputDir != "" && ex.Attrs["mode"] == "delete":
			targets = append(targets, filesync.WithFSSyncDirDelete(i, ex.OutputDir))
		case ex.OutputDir != "":
			targets = append(targets, filesync.WithFSSyncDir(i, ex.OutputDir))
		}
	}
	if len(targets) > 0 {
		s.Allow(filesync.NewFSSyncTarget(targets...))
	}
	if err := allowContent(s, opts); err != nil {
		return nil, err
	}
	for _, a := range opts.Attachables {
		s.Allow(a)
	}
	return s, nil
}

// allowContent serves the OCI layouts that the build may read images from, and the
// directories of its caches.
func allowContent(s *session.Session, opts SolveOptions) error {
	stores := map[string]content.Store{}
	for name, dir := range opts.OCILayouts {
		if _, err := os.Stat(dir); err != nil {
			return fmt.Errorf("OCI layout %s: %w", name, err)
		}
		store, err := contentlocal.NewStore(dir)
		if err != nil {
			return fmt.Errorf("OCI layout %s in %s: %w", name, dir, err)
		}
		stores["oci:"+name] = store
	}
	if err := opts.cacheStores(func(name string, store content.Store) { stores[name] = store }); err != nil {
		return err
	}
	if len(stores) > 0 {
		s.Allow(sessioncontent.NewAttachable(stores))
	}
	return nil
}

// openLocal serves dir with every file owned by root, as builds expect.
func openLocal(dir string) (fsutil.FS, error) {
	st, err := os.Stat(dir)
	if err != nil {
		return nil, err
	}
	if !st.IsDir() {
		return nil, fmt.Errorf("%s is not a directory", dir)
	}
	fs, err := fsutil.NewFS(dir)
	if err != nil {
		return nil, err
	}
	return fsutil.NewFilterFS(fs, &fsutil.FilterOpt{Map: func(_ string, st *fstypes.Stat) fsutil.MapResult {
		st.Uid, st.Gid = 0, 0
		return fsutil.MapResultKeep
	}})
}

// ParseExport reads the form that users write: type=local,dest=DIR and so on.
// stdout is where archives without a dest, or with the dest "-", go.
func ParseExport(fields []string, stdout io.Writer) (Export, error) {
	ex := Export{Attrs: map[string]string{}}
	for _, f := range fields {
		k, v, ok := strings.Cut(f, "=")
		k = strings.ToLower(k)
		switch {
		case !ok:
			return ex, fmt.Errorf("output %q: not of the form key=value", f)
		case k == "type":
			ex.Type = v
		case k == "output":
			return ex, fmt.Errorf("output=%s is not supported; you meant dest=%s", v, v)
		default:
			ex.Attrs[k] = v
		}
	}
	dest := ex.Attrs["dest"]
	switch ex.Type {
	case "":
		return ex, errors.New("an output needs type=")
	case "local":
		if dest == "" {
			return ex, errors.New("output type=local needs dest=DIR")
		}
		ex.OutputDir = dest
	case "tar", "oci", "docker":
		ex.Output = fileOutput(dest, stdout)
	default:
		if dest != "" {
			return ex, fmt.Errorf("output type=%s takes no dest", ex.Type)
		}
	}
	delete(ex.Attrs, "dest")
	return ex, nil
}

func fileOutput(dest string, stdout io.Writer) func(map[string]string) (io.WriteCloser, error) {
	return func(map[string]string) (io.WriteCloser, error) {
		if dest == "" || dest == "-" {
			if stdout == nil {
				return nil, errors.New("an archive needs dest=FILE: it is not written to a terminal")
			}
			return keptOpen{stdout}, nil
		}
		return os.Create(dest)
	}
}

// keptOpen is a file that others go on writing to.
type keptOpen struct{ io.Writer }

func (keptOpen) Close() error { return nil }
