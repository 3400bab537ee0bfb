package rootless

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var users = &Namespace{UIDs: []Range{{0, 1000, 1}, {1, 100000, 65536}}, GIDs: []Range{{0, 1000, 1}, {1, 200000, 65536}}}

var machine = &Namespace{UIDs: []Range{{0, 0, all}}, GIDs: []Range{{0, 0, all}}}

func TestParseMap(t *testing.T) {
	got := parseMap("         1     100000      65536\n         0       1000          1\nnonsense\n")
	if !slices.Equal(got, users.UIDs) {
		t.Errorf("%v", got)
	}
	if !users.Mapped() || machine.Mapped() {
		t.Error("which namespace is the machine's is mistaken")
	}
}

func TestExplain(t *testing.T) {
	cause := errors.New("chown f: invalid argument")
	for _, tc := range []struct {
		uid, gid int
		want     string // "" is the cause alone
	}{
		{0, 0, ""}, {65536, 65536, ""}, {-1, -1, ""}, {65537, 0, "user 65537 is outside the ids that this rootless daemon has, 0 to 65536; a larger range in /etc/subuid"},
		{5, 70000, "group 70000 is outside the ids that this rootless daemon has, 0 to 65536; a larger range in /etc/subgid"},
	} {
		err := users.Explain(cause, tc.uid, tc.gid)
		if !errors.Is(err, cause) || !strings.Contains(err.Error(), tc.want) || tc.want == "" && err != cause {
			t.Errorf("%d:%d: %v", tc.uid, tc.gid, err)
		}
	}
	if got := users.Ranges(); got != "0 to 65536" {
		t.Error(got)
	}
	if got := (&Namespace{UIDs: users.UIDs, GIDs: []Range{{0, 7, 1}, {5, 9, 2}}}).Ranges(); got != "users 0 to 65536 and groups 0 to 0, 5 to 6" {
		t.Error(got)
	}
	if err := users.Explain(nil, 70000, 70000); err != nil {
		t.Error(err)
	}
	if err := machine.Explain(cause, all, all); err != cause {
		t.Error(err)
	}
}

func TestSubIDs(t *testing.T) {
	text := "other:100000:65536\nann:165536:65536\n# ann:1:2\n1000:500000:10\nann:bad:5\nann:7:0\nann:4294967295:5\n\nann:9\n"
	if got, want := parseSubIDs(text, "ann", 1000), []span{{165536, 65536}, {500000, 10}}; !slices.Equal(got, want) {
		t.Errorf("%v", got)
	}
	args := strings.Join(mapArgs(77, 1000, []span{{165536, 65536}, {500000, 10}}), " ")
	if args != "77 0 1000 1 1 165536 65536 65537 500000 10" {
		t.Error(args)
	}
	file := filepath.Join(t.TempDir(), "subgid")
	_, err := subIDs(file, "ann", 1000)
	if err == nil || !strings.Contains(err.Error(), file+" has no range of ids for user ann (1000)") || !strings.Contains(err.Error(), "usermod --add-subgids 100000-165535 ann") {
		t.Errorf("%v", err)
	}
}

func TestForbidden(t *testing.T) {
	dir := t.TempDir()
	write := func(name, value string) {
		t.Helper()
		file := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(value+"\n"), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if got := forbidden(dir); got != "" {
		t.Errorf("without settings: %s", got)
	}
	write("user/max_user_namespaces", "96365")
	write("kernel/unprivileged_userns_clone", "1")
	write("kernel/apparmor_restrict_unprivileged_userns", "0")
	if got := forbidden(dir); got != "" {
		t.Errorf("with all allowed: %s", got)
	}
	write("user/max_user_namespaces", "0")
	write("kernel/unprivileged_userns_clone", "0")
	write("kernel/apparmor_restrict_unprivileged_userns", "1")
	for _, want := range []string{"sysctl user.max_user_namespaces=10000", "sysctl kernel.unprivileged_userns_clone=1", "AppArmor"} {
		if got := forbidden(dir); !strings.Contains(got, want) {
			t.Errorf("%q is missing in: %s", want, got)
		}
	}
}

// A state directory is of one daemon's ids for ever.
func TestClaim(t *testing.T) {
	root := filepath.Join(t.TempDir(), "state")
	if err := machine.claim(root); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := users.claim(root); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "db"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(users.claim(root), users.check(root)); err != nil {
		t.Error(err)
	}
	other := &Namespace{UIDs: []Range{{0, 1001, 1}}, GIDs: []Range{{0, 1001, 1}}}
	for name, tc := range map[string]struct {
		ns   *Namespace
		want string
	}{"other ids": {other, "was made with other ids"}, "root": {machine, "is that of a rootless daemon"}} {
		for _, err := range []error{tc.ns.claim(root), tc.ns.check(root)} {
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

func TestClaimOfAnothersDirectory(t *testing.T) {
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, idsFile+".new"), nil, 0o600); err != nil { // by a crash
		t.Fatal(err)
	}
	if err := users.claim(root); err != nil {
		t.Error(err)
	}
	root = t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "precious"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := users.claim(root); err == nil || !strings.Contains(err.Error(), "precious") {
		t.Errorf("%v", err)
	}
	if err := machine.claim(root); err != nil {
		t.Error(err)
	}
}

// compat: DMN-001, DMN-003
func TestUserPaths(t *testing.T) {
	t.Setenv("HOME", "/home/ann")
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/1000:/other")
	t.Setenv("XDG_DATA_HOME", "")
	t.Setenv("XDG_CONFIG_HOME", "")
	want := Paths{"/home/ann/.config/buildkit/buildkitd.toml", "/home/ann/.local/share/kiln", "unix:///run/user/1000/buildkit/buildkitd.sock"}
	if got := User(); got != want {
		t.Errorf("%+v", got)
	}
	t.Setenv("XDG_DATA_HOME", "/data")
	t.Setenv("XDG_CONFIG_HOME", "/conf")
	t.Setenv("XDG_RUNTIME_DIR", "")
	if got := User(); got != (Paths{"/conf/buildkit/buildkitd.toml", "/data/kiln", Machine().Address}) {
		t.Errorf("%+v", got)
	}
	t.Setenv("HOME", "")
	t.Setenv("XDG_DATA_HOME", "")
	t.Setenv("XDG_CONFIG_HOME", "")
	if got := User(); got != Machine() {
		t.Errorf("%+v", got)
	}
}
