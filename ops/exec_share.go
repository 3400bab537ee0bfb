package ops

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/kilnbuild/kiln/solver"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/solver/pb"
)

// SharingKey says with whom a run of the step may be shared. What a step may
// read from a session is
//
//   - secrets, as files or variables: their contents must agree, at the time of
//     joining, not their ids. A secret that one has and another hasn't differs.
//     They go in through a hash whose key lives in this process alone.
//   - an SSH agent, which can't be compared: only within the same sessions.
//
// What else must agree though the cache key leaves it out: proxies, the
// addresses of extra hosts, cache mounts and their sharing (all in the op), and
// limits of resources and time. Entitlements are the build's Domain (solver.BuildOptions). Inputs
// were got by each build with its own sessions.
//
// compat: LLB-011 no: a step with other limits is another run, not one with the most relaxed of all
func (e *execOp) SharingKey(ctx context.Context, asker solver.Asker) (string, error) {
	mac := hmac.New(sha256.New, e.loader.secrets)
	add := func(parts ...[]byte) {
		for _, p := range parts {
			fmt.Fprintf(mac, "%d ", len(p))
			mac.Write(p)
		}
	}
	dt, err := json.Marshal([]any{e.op, e.resources, e.limits})
	if err != nil {
		return "", fmt.Errorf("encode op for its sharing key: %w", err)
	}
	add([]byte("op"), dt)
	group := sessionGroup(asker)
	for _, want := range e.wantedSecrets() {
		data, ok, err := e.loader.secret(ctx, group, want.id, want.optional)
		if err != nil {
			return "", err
		}
		if ok {
			add([]byte("secret"), []byte(want.id), data)
		}
	}
	if e.usesSSH() {
		add([]byte("sessions"), []byte(sameSessions(group)))
	}
	return hex.EncodeToString(mac.Sum(nil)), nil
}

// sameSessions is the same for groups of the same sessions only.
func sameSessions(g session.Group) string {
	ids := session.AllSessionIDs(g)
	slices.Sort(ids)
	return fmt.Sprintf("sessions %q", slices.Compact(ids))
}

type wantedSecret struct {
	id       string
	optional bool
}

// wantedSecrets are the secrets that the step reads.
func (e *execOp) wantedSecrets() []wantedSecret {
	var out []wantedSecret
	for _, s := range e.op.Secretenv {
		out = append(out, wantedSecret{s.ID, s.Optional})
	}
	for _, m := range e.op.Mounts {
		if m.MountType == pb.MountType_SECRET {
			out = append(out, wantedSecret{m.SecretOpt.ID, m.SecretOpt.Optional})
		}
	}
	return out
}

func (e *execOp) usesSSH() bool {
	return slices.ContainsFunc(e.op.Mounts, func(m *pb.Mount) bool { return m.MountType == pb.MountType_SSH })
}
