package build

import (
	"context"
	"fmt"
	"maps"
	"strings"

	"github.com/kilnbuild/kiln/frontend"
	"github.com/kilnbuild/kiln/frontend/gateway"
	"github.com/kilnbuild/kiln/ops"
	"github.com/kilnbuild/kiln/ops/policy"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/solver/pb"
	spb "github.com/moby/buildkit/sourcepolicy/pb"
	"github.com/moby/buildkit/sourcepolicy/policysession"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// maxDecisions bounds how often a session is asked about one source, with what
// it converts the source to and what it wants to know of it.
const maxDecisions = 10

// sources decides which sources a request may use, and what stands in for them
// (LLB-122): by the rules of the build and of the request, then by whom the
// client has named to ask.
type sources struct {
	br    *bridge
	rules *policy.Rules
	asked string // session of the one to ask; "" is nobody
}

// sources are those that a request of the build may use; it may bring rules of
// its own.
func (br *bridge) sources(own []*spb.Policy) (*sources, error) {
	for i, p := range own {
		if p == nil {
			return nil, invalid("SourcePolicies[%d] is empty", i)
		}
	}
	req := br.b.req
	rules, err := policy.New(append([]*spb.Policy{req.Policy}, own...)...)
	if err != nil {
		return nil, invalid("SourcePolicies: %v", err)
	}
	return &sources{br: br, rules: rules, asked: req.PolicySession}, nil
}

// rewrite is def with what the policies make of its sources.
func (s *sources) rewrite(ctx context.Context, def *pb.Definition) (*pb.Definition, error) {
	if s.rules.Empty() && s.asked == "" {
		return def, nil
	}
	return ops.Rewrite(ctx, def, func(ctx context.Context, op *pb.Op) (bool, error) {
		src, err := s.decide(ctx, op.GetSource(), op.Platform)
		if err != nil || src == nil {
			return false, err
		}
		op.Op = &pb.Op_Source{Source: src}
		return true, nil
	})
}

// decide returns what stands in for src; nil if it may be used as it is.
func (s *sources) decide(ctx context.Context, src *pb.SourceOp, platform *pb.Platform) (*pb.SourceOp, error) {
	own := proto.CloneOf(src)
	own.Identifier = policy.Full(own.Identifier)
	converted := false
	asked := 0
	for {
		changed, err := s.rules.Apply(own)
		if err != nil {
			return nil, err
		}
		converted = converted || changed
		var update *pb.SourceOp
		if s.asked != "" {
			if update, err = s.ask(ctx, own, platform, &asked); err != nil {
				return nil, err
			}
		}
		if update == nil {
			break
		}
		own.Identifier, own.Attrs, converted = policy.Full(update.Identifier), update.Attrs, true
	}
	if !converted {
		return nil, nil
	}
	return own, nil
}

// ask asks the client's policy about src, and answers what it wants to know
// (LLB-123). It returns what stands in for src; nil if it may be used.
func (s *sources) ask(ctx context.Context, src *pb.SourceOp, platform *pb.Platform, asked *int) (*pb.SourceOp, error) {
	caller, err := s.br.b.engine.cfg.Worker.Sessions().Get(ctx, s.asked, false)
	if err != nil {
		return nil, fmt.Errorf("ask the policy of session %s about source %q: %w", s.asked, src.Identifier, err)
	}
	ctx = caller.Context(ctx)
	verifier := policysession.NewPolicyVerifierClient(caller.Conn())
	req := &policysession.CheckPolicyRequest{Platform: platform, Source: &gwpb.ResolveSourceMetaResponse{Source: src}}
	for ; *asked < maxDecisions; *asked++ {
		resp, err := verifier.CheckPolicy(ctx, req)
		if err != nil {
			return nil, fmt.Errorf("ask the policy of session %s about source %q: %w", s.asked, src.Identifier, err)
		}
		if want := resp.GetRequest(); want != nil {
			if req.Source, err = s.tell(ctx, src, want); err != nil {
				return nil, fmt.Errorf("tell the policy about source %q: %w", src.Identifier, err)
			}
			continue
		}
		*asked++
		return decided(src, resp.GetDecision())
	}
	return nil, status.Errorf(codes.FailedPrecondition, "the policy of session %s has not decided on source %q after %d answers", s.asked, src.Identifier, maxDecisions)
}

// tell answers what a policy wants to know of src.
func (s *sources) tell(ctx context.Context, src *pb.SourceOp, want *gwpb.ResolveSourceMetaRequest) (*gwpb.ResolveSourceMetaResponse, error) {
	if id := want.Source.GetIdentifier(); id != src.Identifier || !maps.Equal(want.Source.GetAttrs(), src.Attrs) {
		return nil, invalid("it asks for %q, with other attributes maybe; it may ask for the source itself only", id)
	}
	return gateway.SourceMeta(want, func(opt frontend.MetaOptions) (*frontend.SourceMeta, error) {
		return s.br.sourceMeta(ctx, src, opt)
	})
}

// decided returns what stands in for src; nil if it may be used.
func decided(src *pb.SourceOp, d *policysession.DecisionResponse) (*pb.SourceOp, error) {
	switch {
	case d == nil:
		return nil, invalid("the policy's answer on source %q is neither a decision nor a question", src.Identifier)
	case d.Action == spb.PolicyAction_ALLOW:
		return nil, nil
	case d.Action != spb.PolicyAction_CONVERT:
		return nil, notAllowed(src, d)
	case d.Update.GetIdentifier() == "":
		return nil, invalid("the policy converts source %q to nothing", src.Identifier)
	}
	return d.Update, nil
}

// notAllowed has the policy's messages, also for clients that show them in ways
// of their own.
func notAllowed(src *pb.SourceOp, d *policysession.DecisionResponse) error {
	text := fmt.Sprintf("source %q not allowed by policy: action %s", src.Identifier, d.Action)
	var messages []string
	for _, m := range d.DenyMessages {
		messages = append(messages, m.GetMessage())
	}
	if len(messages) > 0 {
		text += ": " + strings.Join(messages, "; ")
	}
	return policysession.WrapDenyMessages(status.Error(codes.PermissionDenied, text), d.DenyMessages)
}
