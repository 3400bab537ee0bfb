//go:build selinux && linux && (amd64 || arm64)

package container

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Where the policy is enforced, containers have their labels, and the reason why
// one can't have its label is told. The process that makes them is the one of
// an administrator, and not the kernel's own, which may do what it likes.
func TestSELinuxEnforced(t *testing.T) {
	const inChild = "KILN_TEST_SELINUX_ENFORCED"
	if os.Getenv(inChild) != "" {
		testEnforced(t)
		return
	}
	mode, err := os.ReadFile(enforceFile)
	if err != nil {
		t.Fatal("this machine has no SELinux: hack/vmtest with KILN_VM_PACKAGES=selinux-policy-default and KILN_VM_CMDLINE='security=selinux enforcing=0' has")
	}
	t.Cleanup(func() { enforce(t, string(mode)) })
	cmd := exec.Command("runcon", administrator, os.Args[0], "-test.v", "-test.run", "^TestSELinuxEnforced$")
	cmd.Env = append(os.Environ(), inChild+"=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

const (
	enforceFile   = "/sys/fs/selinux/enforce"
	administrator = "system_u:system_r:unconfined_t:s0-s0:c0.c1023"
)

func enforce(t *testing.T, mode string) {
	if err := os.WriteFile(enforceFile, []byte(mode), 0); err != nil {
		t.Error(err)
	}
}

func testEnforced(t *testing.T) {
	enforce(t, "1")
	const process, files = "system_u:system_r:unconfined_t:s0:c1,c2", "system_u:object_r:tmp_t:s0:c1,c2"
	testLabelled(t, process, files, false)
	for _, tc := range []struct {
		label           string
		noNewPrivileges bool
		program         string // its label
		want            string
	}{
		{"system_u:system_r:svirt_t:s0:c1,c2", false, "", "forbids it to processes with the label " + administrator + ", as this one: they lack the permission transition of the class process"},
		{process, true, "", "they lack the permission nnp_transition of the class process2, which process.noNewPrivileges takes"},
		{process, false, "system_u:object_r:etc_t:s0", "permission denied, perhaps by SELinux"},
	} {
		bundle, spec := newBundle(t, "exit 0")
		labelProgram(t, bundle)
		if tc.program != "" {
			setLabel(t, filepath.Join(bundle, "rootfs/bin/busybox"), tc.program)
		}
		spec.Process.SelinuxLabel, spec.Process.NoNewPrivileges = tc.label, tc.noNewPrivileges
		b, err := tryCreate(t, bundle, spec)
		if err == nil { // the file's label counts when it is executed
			b.start()
			err = b.p.Failure()
			b.end()
		}
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: error %v, want %q in it", tc.label, err, tc.want)
		}
	}
}
