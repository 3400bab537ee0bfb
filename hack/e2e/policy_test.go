//go:build e2e

package e2e

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kilnbuild/kiln/client/llb"
	"github.com/moby/buildkit/solver/pb"
	spb "github.com/moby/buildkit/sourcepolicy/pb"
)

// policies are rules with what upstream's buildkitd and kiln make of the sources
// a and b, each of which is a directory with a file of its name.
var policies = []struct {
	name  string
	rules []*spb.Rule
	want  string // names of the files that a is found to have; "" is denied
}{
	{"no rules", nil, "a"},
	{"another source", []*spb.Rule{sourceRule(spb.PolicyAction_DENY, "local://b", spb.MatchType_WILDCARD, nil)}, "a"},
	{"deny", []*spb.Rule{sourceRule(spb.PolicyAction_DENY, "local://a", spb.MatchType_EXACT, nil)}, ""},
	{"deny all", []*spb.Rule{sourceRule(spb.PolicyAction_DENY, "*", spb.MatchType_WILDCARD, nil)}, ""},
	{"allow after deny", []*spb.Rule{
		sourceRule(spb.PolicyAction_DENY, "*", spb.MatchType_WILDCARD, nil), sourceRule(spb.PolicyAction_ALLOW, "local://*", spb.MatchType_WILDCARD, nil),
	}, "a"},
	{"deny after allow", []*spb.Rule{
		sourceRule(spb.PolicyAction_ALLOW, "local://*", spb.MatchType_WILDCARD, nil), sourceRule(spb.PolicyAction_DENY, "^l.*a$", spb.MatchType_REGEX, nil),
	}, ""},
	{"convert", []*spb.Rule{sourceRule(spb.PolicyAction_CONVERT, "local://a", spb.MatchType_EXACT, &spb.Update{Identifier: "local://b"})}, "b"},
	{"convert what is denied", []*spb.Rule{
		sourceRule(spb.PolicyAction_DENY, "local://a", spb.MatchType_EXACT, nil),
		sourceRule(spb.PolicyAction_CONVERT, "local://a", spb.MatchType_EXACT, &spb.Update{Identifier: "local://b"}),
	}, "b"},
	{"convert to what is denied", []*spb.Rule{
		sourceRule(spb.PolicyAction_CONVERT, "local://a", spb.MatchType_EXACT, &spb.Update{Identifier: "local://b"}),
		sourceRule(spb.PolicyAction_DENY, "local://b", spb.MatchType_EXACT, nil),
	}, ""},
	{"wildcard groups", []*spb.Rule{sourceRule(spb.PolicyAction_CONVERT, "loc*://a*", spb.MatchType_WILDCARD, &spb.Update{Identifier: "loc${1}://b$2"})}, "b"},
	{"regex groups", []*spb.Rule{sourceRule(spb.PolicyAction_CONVERT, "^(.*)://a$", spb.MatchType_REGEX, &spb.Update{Identifier: "$1://b"})}, "b"},
	{"circle", []*spb.Rule{
		sourceRule(spb.PolicyAction_CONVERT, "local://a", spb.MatchType_EXACT, &spb.Update{Identifier: "local://b"}),
		sourceRule(spb.PolicyAction_CONVERT, "local://b", spb.MatchType_EXACT, &spb.Update{Identifier: "local://a"}),
	}, ""},
	{"attributes", []*spb.Rule{sourceRule(spb.PolicyAction_CONVERT, "local://a", spb.MatchType_EXACT,
		&spb.Update{Attrs: map[string]string{pb.AttrExcludePatterns: `["a"]`}})}, "-"},
	{"constraint that holds", []*spb.Rule{constrained(pb.AttrSharedKeyHint, "of .*", spb.AttrMatch_MATCHES)}, ""},
	{"constraint that doesn't", []*spb.Rule{constrained(pb.AttrSharedKeyHint, "of a", spb.AttrMatch_NOTEQUAL)}, "a"},
	{"constraint on nothing", []*spb.Rule{constrained("none", "", spb.AttrMatch_EQUAL)}, ""},
}

func sourceRule(action spb.PolicyAction, id string, match spb.MatchType, updates *spb.Update) *spb.Rule {
	return &spb.Rule{Action: action, Selector: &spb.Selector{Identifier: id, MatchType: match}, Updates: updates}
}

func constrained(key, value string, condition spb.AttrMatch) *spb.Rule {
	r := sourceRule(spb.PolicyAction_DENY, "local://*", spb.MatchType_WILDCARD, nil)
	r.Selector.Constraints = []*spb.AttrConstraint{{Key: key, Value: value, Condition: condition}}
	return r
}

// withPolicy are the flags of a client with these rules.
func withPolicy(t *testing.T, rules []*spb.Rule) []string {
	t.Helper()
	text, err := json.Marshal(&spb.Policy{Version: 1, Rules: rules})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "policy.json")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{"--source-policy-file", file}
}

// What upstream's buildctl has for a policy is a policy here as there.
//
// compat: LLB-120, LLB-121, LLB-122, LLB-C38, CTL-025, LLB-002
func TestSourcePolicies(t *testing.T) {
	daemons := map[string]string{"kiln": newDaemon(t).addr, "peer": peerDaemon(t)}
	a, b := files{"a": "a"}.write(t), files{"b": "b"}.write(t)
	def, err := llb.Scratch().File(llb.Copy(llb.Local("a", llb.SharedKeyHint("of a")), "*", "/", &llb.CopyInfo{AllowWildcard: true, AllowEmptyWildcard: true})).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range policies {
		for name, addr := range daemons {
			t.Run(c.name+"/"+name, func(t *testing.T) {
				var in bytes.Buffer
				if err := llb.WriteTo(def, &in); err != nil {
					t.Fatal(err)
				}
				out := t.TempDir()
				args := append([]string{"--addr", addr, "build", "--progress=plain", "--local", "a=" + a, "--local", "b=" + b, "--output", "type=local,dest=" + out}, withPolicy(t, c.rules)...)
				cmd := exec.Command(filepath.Join(env.peer, "buildctl"), args...)
				cmd.Stdin = &in
				r := runCommand(t, cmd)
				if c.want == "" {
					r.fails(t)
					if text := r.stderr; !strings.Contains(text, "denied by policy") && c.name != "circle" {
						t.Errorf("the error says nothing of a policy: %s", text)
					}
					return
				}
				r.must(t)
				entries, err := os.ReadDir(out)
				if err != nil {
					t.Fatal(err)
				}
				got := ""
				for _, e := range entries {
					got += e.Name()
				}
				if got != strings.Trim(c.want, "-") {
					t.Errorf("the result has the files %q; want %q", got, c.want)
				}
			})
		}
	}
}

// Policies hold for what a Dockerfile needs: the metadata of its base image, the
// image, the context. Who is denied something hears which line asked for it.
//
// compat: LLB-122, LLB-012, GW-021
func TestSourcePoliciesOfDockerfiles(t *testing.T) {
	d := newDaemon(t)
	other := withPolicy(t, []*spb.Rule{sourceRule(spb.PolicyAction_CONVERT, "docker-image://docker.io/library/nowhere:*", spb.MatchType_WILDCARD,
		&spb.Update{Identifier: "docker-image://" + env.base})})
	out := d.local("FROM nowhere:1 AS b\nRUN echo ran > /f\nFROM scratch\nCOPY --from=b /f /\n", nil, other...)
	if got := readFile(t, out, "f"); got != "ran\n" {
		t.Errorf("on the other image: %q", got)
	}
	noImages := withPolicy(t, []*spb.Rule{sourceRule(spb.PolicyAction_DENY, "docker-image://*", spb.MatchType_WILDCARD, nil)})
	d.dockerfile("FROM scratch\nCOPY f /\n", files{"f": "f"}, noImages...).must(t)
	d.dockerfile("FROM BASE\nCOPY f /\n", files{"f": "f"}, noImages...).fails(t, "denied by policy", env.base)
	noDownloads := withPolicy(t, []*spb.Rule{sourceRule(spb.PolicyAction_DENY, "^https?://", spb.MatchType_REGEX, nil)})
	d.dockerfile("FROM scratch\n\nADD http://127.0.0.1:1/x /\n", nil, noDownloads...).
		fails(t, `source "http://127.0.0.1:1/x" denied by policy`, "Dockerfile:3", ">>> ADD http://127.0.0.1:1/x /")
	d.dockerfile("FROM scratch\nCOPY f /\n", files{"f": "f"}, withPolicy(t, []*spb.Rule{sourceRule(spb.PolicyAction_DENY, "(", spb.MatchType_REGEX, nil)})...).
		fails(t, "SourcePolicy: rule 0", "error parsing regexp")
	d.dockerfile("FROM scratch\nCOPY f /\n", files{"f": "f"}, withPolicy(t, []*spb.Rule{{Action: spb.PolicyAction_DENY}})...).
		fails(t, "SourcePolicy: rule 0: it has no selector")
}
