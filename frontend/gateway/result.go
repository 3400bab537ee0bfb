package gateway

import (
	"github.com/kilnbuild/kiln/frontend"
	gwpb "github.com/moby/buildkit/frontend/gateway/pb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// resultToProto registers the refs of res. Clients that can't read Ref messages
// get bare ids (GW-028).
func (s *Server) resultToProto(res *frontend.Result, arrayRefs bool) *gwpb.Result {
	out := &gwpb.Result{Metadata: res.Metadata}
	refs := make(map[string]*gwpb.Ref, len(res.Refs))
	for k, ref := range res.Refs {
		refs[k] = s.refToProto(ref)
	}
	switch {
	case res.Refs != nil && arrayRefs:
		out.Result = &gwpb.Result_Refs{Refs: &gwpb.RefMap{Refs: refs}}
	case res.Refs != nil:
		ids := make(map[string]string, len(refs))
		for k, ref := range refs {
			ids[k] = ref.Id
		}
		out.Result = &gwpb.Result_RefsDeprecated{RefsDeprecated: &gwpb.RefMapDeprecated{Refs: ids}}
	case arrayRefs:
		out.Result = &gwpb.Result_Ref{Ref: s.refToProto(res.Ref)}
	default:
		out.Result = &gwpb.Result_RefDeprecated{RefDeprecated: s.addRef(res.Ref)}
	}
	return out
}

func (s *Server) refToProto(ref frontend.Ref) *gwpb.Ref {
	if ref == nil {
		return &gwpb.Ref{}
	}
	return &gwpb.Ref{Id: s.addRef(ref), Def: ref.Definition()}
}

// resultFromProto looks up the refs that a Return names.
func (s *Server) resultFromProto(in *gwpb.Result) (*frontend.Result, error) {
	res := &frontend.Result{Metadata: in.Metadata}
	var err error
	switch r := in.Result.(type) {
	case nil:
	case *gwpb.Result_Ref:
		res.Ref, err = s.ref(r.Ref.GetId())
	case *gwpb.Result_RefDeprecated:
		res.Ref, err = s.ref(r.RefDeprecated)
	case *gwpb.Result_Refs:
		res.Refs = map[string]frontend.Ref{}
		for k, ref := range r.Refs.GetRefs() {
			if res.Refs[k], err = s.ref(ref.GetId()); err != nil {
				break
			}
		}
	case *gwpb.Result_RefsDeprecated:
		res.Refs = map[string]frontend.Ref{}
		for k, id := range r.RefsDeprecated.GetRefs() {
			if res.Refs[k], err = s.ref(id); err != nil {
				break
			}
		}
	default:
		err = status.Errorf(codes.InvalidArgument, "Return: result of unknown kind %T", r)
	}
	if err != nil {
		return nil, err
	}
	return res, nil
}
