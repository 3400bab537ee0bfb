package build

import (
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/kilnbuild/kiln/ops/policy"
	control "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/solver/pb"
	spb "github.com/moby/buildkit/sourcepolicy/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Request is a checked request to build.
type Request struct {
	Ref          string
	Session      string
	Definition   *pb.Definition
	Frontend     string
	Opts         map[string]string
	Inputs       map[string]*pb.Definition
	Exporters    []*control.Exporter
	Entitlements []string
	Internal     bool // leaves no history (CTL-024)
	CacheImports []*control.CacheOptionsEntry
	CacheExports []*control.CacheOptionsEntry
	Warnings     []string // about parts of the request that have no effect

	Policy        *spb.Policy // which sources may be used; may be nil
	PolicySession string      // to be asked after it; "" is nobody
}

// maxRef bounds client-chosen ids, which name records and appear in logs.
const maxRef = 256

// ParseRequest checks what a client sent (CTL-010 to -031). Every error carries
// InvalidArgument, or Unimplemented for what the daemon doesn't have, and names
// the field.
func ParseRequest(in *control.SolveRequest) (Request, error) {
	req := Request{
		Ref: in.Ref, Session: in.Session, Definition: in.Definition, Frontend: in.Frontend,
		Opts: in.FrontendAttrs, Inputs: in.FrontendInputs, Exporters: in.Exporters,
		Entitlements: in.Entitlements, Internal: in.Internal,
		Policy: in.SourcePolicy, PolicySession: in.SourcePolicySession,
	}
	switch {
	case in.Ref == "":
		return req, invalid("Ref is missing")
	case len(in.Ref) > maxRef:
		return req, invalid("Ref has %d bytes; at most %d are allowed", len(in.Ref), maxRef)
	case len(in.Definition.GetDef()) > 0 && in.Frontend != "":
		return req, invalid("Definition and Frontend (%q) exclude each other", in.Frontend)
	}
	for name, def := range in.FrontendInputs {
		if def == nil {
			return req, invalid("FrontendInputs[%q] is empty", name)
		}
	}
	if len(req.Exporters) == 0 && in.ExporterDeprecated != "" {
		req.Exporters = []*control.Exporter{{Type: in.ExporterDeprecated, Attrs: in.ExporterAttrsDeprecated}}
	}
	for i, ex := range req.Exporters {
		if ex.GetType() == "" {
			return req, invalid("Exporters[%d].Type is missing", i)
		}
	}
	req.parseCache(in.Cache)
	if err := req.checkFeatures(in); err != nil {
		return req, err
	}
	req.propagateEpoch()
	return req, nil
}

// checkFeatures refuses what would change the result if it were ignored, and
// notes what would only make it slower.
func (r *Request) checkFeatures(in *control.SolveRequest) error {
	switch {
	case in.ProxyNetwork:
		return unsupported("ProxyNetwork: this daemon has no proxy network")
	}
	if _, err := policy.New(in.SourcePolicy); err != nil {
		return invalid("SourcePolicy: %v", err)
	}
	switch v := in.CompatibilityVersion; {
	case v == 0 || v == 30:
	case v == 10 || v == 20:
		return unsupported("CompatibilityVersion: this daemon builds at version 30, not %d", v)
	case v > 30:
		return unsupported("CompatibilityVersion: %d is newer than this daemon's 30; upgrade the daemon", v)
	default:
		return invalid("CompatibilityVersion: %d is not one of 10, 20, 30", v)
	}
	for _, k := range slices.Sorted(maps.Keys(r.Opts)) {
		// buildx asks for an inline-only one by itself: nobody misses that.
		v := r.Opts[k]
		if kind, ok := strings.CutPrefix(k, "attest:"); ok && v != "disabled=true" && !strings.Contains(v, "inline-only=true") {
			r.Warnings = append(r.Warnings, kind+" attestations are left out: this daemon does not make them")
		}
	}
	return nil
}

// parseCache collects the caches to import and to export, in the old forms, too.
func (r *Request) parseCache(c *control.CacheOptions) {
	r.CacheImports = slices.DeleteFunc(slices.Clone(c.GetImports()), isNil)
	for _, ref := range c.GetImportRefsDeprecated() {
		r.CacheImports = append(r.CacheImports, &control.CacheOptionsEntry{Type: "registry", Attrs: map[string]string{"ref": ref}})
	}
	r.CacheExports = slices.DeleteFunc(slices.Clone(c.GetExports()), isNil)
	if ref := c.GetExportRefDeprecated(); ref != "" {
		attrs := maps.Clone(c.GetExportAttrsDeprecated())
		if attrs == nil {
			attrs = map[string]string{}
		}
		attrs["ref"] = ref
		r.CacheExports = append(r.CacheExports, &control.CacheOptionsEntry{Type: "registry", Attrs: attrs})
	}
}

func isNil(e *control.CacheOptionsEntry) bool { return e == nil }

// propagateEpoch copies a numeric SOURCE_DATE_EPOCH build argument to every
// exporter that has none (CTL-031); other values are the frontend's business.
func (r *Request) propagateEpoch() {
	epoch, ok := r.Opts["build-arg:SOURCE_DATE_EPOCH"]
	if !ok {
		return
	}
	if _, err := strconv.ParseInt(epoch, 10, 64); err != nil && epoch != "" {
		return
	}
	for _, ex := range r.Exporters {
		if _, ok := ex.Attrs["source-date-epoch"]; !ok {
			if ex.Attrs == nil {
				ex.Attrs = map[string]string{}
			}
			ex.Attrs["source-date-epoch"] = epoch
		}
	}
}

func invalid(format string, args ...any) error {
	return status.Errorf(codes.InvalidArgument, format, args...)
}

func unsupported(format string, args ...any) error {
	return status.Errorf(codes.Unimplemented, format, args...)
}
