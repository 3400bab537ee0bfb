package build

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/kilnbuild/kiln/frontend"
	"github.com/kilnbuild/kiln/ops/sessiontest"
	"github.com/kilnbuild/kiln/ops/source/registry/registrytest"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	spb "github.com/moby/buildkit/sourcepolicy/pb"
	"github.com/moby/buildkit/sourcepolicy/policysession"
	"github.com/moby/buildkit/util/grpcerrors"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// verifier is a client's policy: answer says what becomes of a source.
type verifier struct {
	answer func(*policysession.CheckPolicyRequest) (*policysession.DecisionResponse, *gwpb.ResolveSourceMetaRequest, error)

	mu    sync.Mutex // guards asked
	asked []string   // what of which source was known when it was asked about
}

func (v *verifier) check(_ context.Context, req *policysession.CheckPolicyRequest) (*policysession.DecisionResponse, *gwpb.ResolveSourceMetaRequest, error) {
	known := "nothing"
	if req.Source.Image != nil {
		known = "its digest"
	}
	v.mu.Lock()
	v.asked = append(v.asked, req.Source.Source.Identifier+" "+known)
	v.mu.Unlock()
	return v.answer(req)
}

// underPolicy solves the image base:1 in a build whose client has the policy v,
// and rules.
func (d *daemon) underPolicy(v *verifier, rules ...*spb.Rule) (*pb.Definition, error) {
	d.t.Helper()
	session := sessiontest.Connect(d.t, d.worker.Sessions(), "", policysession.NewPolicyProvider(v.check))
	def := d.definition("base", "")
	req := Request{Ref: fmt.Sprintf("build-%p", v), Definition: def, PolicySession: session, Policy: &spb.Policy{Rules: rules}}
	b, err := d.engine.register(d.t.Context(), req)
	d.must(err)
	defer d.engine.running.Done()
	defer b.finish(nil, nil)
	res, err := b.bridge.Solve(d.t.Context(), frontend.SolveRequest{Definition: def})
	if err != nil {
		return nil, err
	}
	return res.Ref.Definition(), res.Ref.Evaluate(d.t.Context())
}

func allowed() (*policysession.DecisionResponse, *gwpb.ResolveSourceMetaRequest, error) {
	return &policysession.DecisionResponse{Action: spb.PolicyAction_ALLOW}, nil, nil
}

// A client's policy is asked about every source after the rules, is told what it
// wants to know, and decides.
//
// compat: LLB-123, LLB-C39, CTL-026, SES-075
func TestPolicySession(t *testing.T) {
	d := newDaemon(t)
	d.reg.Push(t, "base", "2", registrytest.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, Layers: []map[string]string{{"other": "other"}},
	})
	first, second := "docker-image://"+d.reg.Host+"/base:1", "docker-image://"+d.reg.Host+"/base:2"
	type decision = policysession.DecisionResponse
	for _, c := range []struct {
		name   string
		rules  []*spb.Rule
		answer func(*policysession.CheckPolicyRequest) (*decision, *gwpb.ResolveSourceMetaRequest, error)
		asked  []string
		want   string // the source that is used
		err    []string
	}{
		{name: "allow", asked: []string{first + " nothing"}, want: first,
			answer: func(*policysession.CheckPolicyRequest) (*decision, *gwpb.ResolveSourceMetaRequest, error) {
				return allowed()
			}},
		{name: "deny", asked: []string{first + " nothing"}, err: []string{first, "not allowed by policy: action DENY: too old; too big"},
			answer: func(*policysession.CheckPolicyRequest) (*decision, *gwpb.ResolveSourceMetaRequest, error) {
				return &decision{Action: spb.PolicyAction_DENY, DenyMessages: []*policysession.DenyMessage{{Message: "too old"}, {Message: "too big"}}}, nil, nil
			}},
		{name: "denied by a rule before it is asked", err: []string{"denied by policy"},
			rules: []*spb.Rule{{Action: spb.PolicyAction_DENY, Selector: &spb.Selector{Identifier: first}}}},
		{name: "converted by a rule before it is asked", asked: []string{second + " nothing"}, want: second,
			rules: []*spb.Rule{{Action: spb.PolicyAction_CONVERT, Selector: &spb.Selector{Identifier: first}, Updates: &spb.Update{Identifier: second}}},
			answer: func(*policysession.CheckPolicyRequest) (*decision, *gwpb.ResolveSourceMetaRequest, error) {
				return allowed()
			}},
		{name: "convert", asked: []string{first + " nothing", second + " nothing"}, want: second,
			answer: func(req *policysession.CheckPolicyRequest) (*decision, *gwpb.ResolveSourceMetaRequest, error) {
				if req.Source.Source.Identifier == first {
					return &decision{Action: spb.PolicyAction_CONVERT, Update: &pb.SourceOp{Identifier: second}}, nil, nil
				}
				return allowed()
			}},
		{name: "converted to what a rule denies", asked: []string{first + " nothing"}, err: []string{second, "denied by policy"},
			rules: []*spb.Rule{{Action: spb.PolicyAction_DENY, Selector: &spb.Selector{Identifier: second}}},
			answer: func(*policysession.CheckPolicyRequest) (*decision, *gwpb.ResolveSourceMetaRequest, error) {
				return &decision{Action: spb.PolicyAction_CONVERT, Update: &pb.SourceOp{Identifier: second}}, nil, nil
			}},
		{name: "a question", asked: []string{first + " nothing", first + " its digest"}, want: first,
			answer: func(req *policysession.CheckPolicyRequest) (*decision, *gwpb.ResolveSourceMetaRequest, error) {
				if req.Source.Image.GetDigest() != "" {
					return allowed()
				}
				return nil, &gwpb.ResolveSourceMetaRequest{Source: req.Source.Source, LogName: "for the policy", Image: &gwpb.ResolveSourceImageRequest{NoConfig: true}}, nil
			}},
		{name: "questions without end", asked: append([]string{first + " nothing"}, slices.Repeat([]string{first + " its digest"}, 9)...), err: []string{"has not decided", "10"},
			answer: func(req *policysession.CheckPolicyRequest) (*decision, *gwpb.ResolveSourceMetaRequest, error) {
				return nil, &gwpb.ResolveSourceMetaRequest{Source: req.Source.Source}, nil
			}},
		{name: "a circle", asked: slices.Repeat([]string{first + " nothing"}, 10), err: []string{"has not decided", "10"},
			answer: func(req *policysession.CheckPolicyRequest) (*decision, *gwpb.ResolveSourceMetaRequest, error) {
				return &decision{Action: spb.PolicyAction_CONVERT, Update: req.Source.Source}, nil, nil
			}},
		{name: "a question about another", asked: []string{first + " nothing"}, err: []string{second, "the source itself only"},
			answer: func(*policysession.CheckPolicyRequest) (*decision, *gwpb.ResolveSourceMetaRequest, error) {
				return nil, &gwpb.ResolveSourceMetaRequest{Source: &pb.SourceOp{Identifier: second}}, nil
			}},
		{name: "converted to nothing", asked: []string{first + " nothing"}, err: []string{first, "to nothing"},
			answer: func(*policysession.CheckPolicyRequest) (*decision, *gwpb.ResolveSourceMetaRequest, error) {
				return &decision{Action: spb.PolicyAction_CONVERT}, nil, nil
			}},
		{name: "no answer", asked: []string{first + " nothing"}, err: []string{first, "the policy is ill"},
			answer: func(*policysession.CheckPolicyRequest) (*decision, *gwpb.ResolveSourceMetaRequest, error) {
				return nil, nil, errors.New("the policy is ill")
			}},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := &verifier{answer: c.answer}
			def, err := d.underPolicy(v, c.rules...)
			if !slices.Equal(v.asked, c.asked) {
				t.Errorf("asked %q; want %q", v.asked, c.asked)
			}
			if c.err != nil {
				for _, want := range c.err {
					if err == nil || !strings.Contains(err.Error(), want) {
						t.Errorf("error %v; want %s", err, want)
					}
				}
				return
			}
			if err != nil || !strings.Contains(string(def.Def[0]), c.want) {
				t.Errorf("%q, error %v; want %s", def.GetDef(), err, c.want)
			}
		})
	}
}

// What a client's policy says when it denies crosses the wire as such. compat: CTL-090
func TestPolicyMessages(t *testing.T) {
	src := &pb.SourceOp{Identifier: "local://x"}
	_, err := decided(src, &policysession.DecisionResponse{Action: spb.PolicyAction_DENY, DenyMessages: []*policysession.DenyMessage{{Message: "no"}}})
	got := policysession.DenyMessages(grpcerrors.FromGRPC(grpcerrors.ToGRPC(t.Context(), err)))
	if len(got) != 1 || got[0].Message != "no" {
		t.Errorf("messages %v of error %v", got, err)
	}
	if _, err := decided(src, nil); status.Code(err) != codes.InvalidArgument {
		t.Errorf("no decision: error %v", err)
	}
}
