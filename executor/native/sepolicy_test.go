//go:build linux && (amd64 || arm64)

package native

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// fakePolicy answers as SELinux would: answers has, by query, what is allowed and
// flags.
func fakePolicy(t *testing.T, enforce string, answers map[string][2]uint32) sePolicy {
	t.Helper()
	dir := t.TempDir()
	for name, content := range map[string]string{
		"enforce": enforce, "class/process/index": "2", "class/process/perms/transition": "2", "class/process/perms/setexec": "17",
		"class/process2/index": "134", "class/process2/perms/nnp_transition": "1",
	} {
		file := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(content), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return sePolicy{
		dir: dir,
		own: func() (string, error) { return "own", nil },
		ask: func(_, query string) (string, error) {
			a, ok := answers[query]
			if !ok {
				return "", unix.EACCES
			}
			return fmt.Sprintf("%x ffffffff 0 ffffffff 7 %x", a[0], a[1]), nil
		},
	}
}

// What an enforced policy refuses is said before it happens, with the permission
// that is missing.
func TestMayExecute(t *testing.T) {
	const setexec, transition, nnp = 1 << 16, 1 << 1, 1
	allowed := map[string][2]uint32{"own own 2": {setexec}, "own other 2": {transition}, "own other 134": {nnp}}
	without := func(query string, flags uint32) map[string][2]uint32 {
		changed := map[string][2]uint32{}
		for q, a := range allowed {
			changed[q] = a
		}
		changed[query] = [2]uint32{^allowed[query][0], flags}
		return changed
	}
	for name, tc := range map[string]struct {
		enforce, label string
		nnp            bool
		answers        map[string][2]uint32
		want           string // "" is no error
	}{
		"allowed":                   {"1", "other", true, allowed, ""},
		"permissive":                {"0", "other", true, without("own other 2", 0), ""},
		"own":                       {"1", "own", true, nil, ""},
		"may not ask":               {"1", "other", true, nil, ""},
		"permissive domain":         {"1", "other", true, without("own other 2", 1), ""},
		"transition":                {"1", "other", false, without("own other 2", 0), "label own, as this one: they lack the permission transition of the class process"},
		"setexec":                   {"1", "other", false, without("own own 2", 0), "permission setexec of the class process"},
		"no new privileges":         {"1", "other", true, without("own other 134", 0), "nnp_transition of the class process2, which process.noNewPrivileges takes"},
		"new privileges, though no": {"1", "other", false, without("own other 134", 0), ""},
	} {
		err := fakePolicy(t, tc.enforce, tc.answers).mayExecute(tc.label, tc.nnp)
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: error %v, want %q", name, err, tc.want)
		}
	}
	if err := (sePolicy{dir: t.TempDir()}).mayExecute("other", true); err != nil {
		t.Errorf("without SELinux: %v", err)
	}
}

func TestExecErrorWithLabel(t *testing.T) {
	p := &specs.Process{Args: []string{"/p"}}
	if err := execError(p, unix.EACCES); err.Error() != `exec: "/p": permission denied` {
		t.Error(err)
	}
	p.SelinuxLabel = "a:b:c:d"
	if err := execError(p, unix.EACCES); !errors.Is(err, unix.EACCES) || !strings.Contains(err.Error(), "permission denied, perhaps by SELinux") || !strings.Contains(err.Error(), "executed as a:b:c:d") {
		t.Error(err)
	}
	if err := execError(p, unix.ENOENT); err.Error() != `exec: "/p": no such file or directory` {
		t.Error(err)
	}
}
