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

// SharingKey says with whom a run of the step may be shared: with those whose
// op agrees in what the cache key leaves out too (proxies, cache mounts), whose
// limits are the same and whose secrets have the same contents. An SSH agent
// can't be compared, so a step that uses one is shared only within the same
// sessions. Secrets go in through a hash whose key lives in this process alone.
func (e *execOp) SharingKey(ctx context.Context, asker solver.Asker) (string, error) {
	mac := hmac.New(sha256.New, e.loader.secrets)
	add := func(kind string, value []byte) {
		fmt.Fprintf(mac, "%s %d\n", kind, len(value))
		mac.Write(value)
	}
	dt, err := json.Marshal([]any{e.op, e.resources})
	if err != nil {
		return "", fmt.Errorf("encode op for its sharing key: %w", err)
	}
	add("op", dt)
	group := SessionGroup(asker)
	for _, want := range e.wantedSecrets() {
		data, ok, err := e.loader.secret(ctx, group, want.id, want.optional)
		if err != nil {
			return "", err
		}
		if ok {
			add("secret "+want.id, data)
		}
	}
	if e.usesSSH() {
		ids := session.AllSessionIDs(group)
		slices.Sort(ids)
		for _, id := range ids {
			add("session", []byte(id))
		}
	}
	return hex.EncodeToString(mac.Sum(nil)), nil
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
