//go:build linux && (amd64 || arm64)

package native

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/kilnbuild/kiln/executor/launch"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const appArmorLabel = "AppArmor profile"

// CheckAppArmor fails where no process can have an AppArmor profile.
func CheckAppArmor() error {
	// Known wherever there is a sysfs; securityfs isn't mounted everywhere.
	const parameter = "/sys/module/apparmor/parameters/enabled"
	data, err := os.ReadFile(parameter)
	switch {
	case err != nil:
		return fmt.Errorf("this kernel has no AppArmor: %w", err)
	case strings.TrimSpace(string(data)) != "Y":
		return errors.New("AppArmor is off on this machine; the kernel's command line turns it on: apparmor=1 security=apparmor")
	}
	return nil
}

// label has the program run under the labels of security modules, from its
// execve on.
func (b *builder) label() error {
	p := b.spec.Process
	if profile := p.ApparmorProfile; profile != "" {
		if err := CheckAppArmor(); err != nil {
			return fmt.Errorf("AppArmor profile %q: %w", profile, err)
		}
		b.writeFile(appArmorLabel, "/proc/self/attr/apparmor/exec", "exec "+profile)
	}
	return b.seLabel()
}

func (m *member) label() error {
	if p := m.spec.Process; p.ApparmorProfile == "" && p.SelinuxLabel == "" {
		return nil
	}
	// The file of a process that hides belongs to the machine's root.
	m.hide(false)
	if err := m.builder.label(); err != nil {
		return err
	}
	m.hide(true)
	return nil
}

// explain is err of a program, with what is missing if the kernel doesn't say it.
func explain(err error, p *specs.Process) error {
	step, ok := errors.AsType[*launch.StepError](err)
	switch {
	case ok && step.What == appArmorLabel && step.Errno == unix.ENOENT:
		return fmt.Errorf("%w: the profile %q is not loaded; load the file that has it with apparmor_parser -r", err, p.ApparmorProfile)
	case ok && step.What == capabilityStep && step.Errno == unix.EPERM:
		if names := lackedCaps(p.Capabilities); len(names) > 0 {
			return fmt.Errorf("%w: the runtime itself doesn't have %s: who started it took that away", err, strings.Join(names, ", "))
		}
		return fmt.Errorf("%w: those of process.capabilities.effective must be among the permitted ones", err)
	case ok:
		if text := hint(step); text != "" {
			return fmt.Errorf("%w: %s", err, text)
		}
	}
	return err
}

// hint says what a failed step most likely means, where its errno alone doesn't.
func hint(s *launch.StepError) string {
	switch {
	case s.Stage == "user" && s.Errno == unix.EINVAL:
		return "the container's user namespace doesn't have the id; add it to linux.uidMappings and linux.gidMappings, or take another"
	case s.Stage == "user" && s.Errno == unix.ENOSYS:
		return "its seccomp profile refuses what it takes to become the user; allow that, or set noNewPrivileges, with which the profile comes later"
	case s.Stage == "limits" && s.Errno == unix.EPERM && strings.HasPrefix(s.What, "RLIMIT_NOFILE"):
		return "it can't be higher than /proc/sys/fs/nr_open, nor than the runtime's own limit without CAP_SYS_RESOURCE"
	case s.Stage == "limits" && s.Errno == unix.EPERM:
		return "to raise a limit takes CAP_SYS_RESOURCE, which the runtime doesn't have"
	case s.Stage == "mount" && s.Errno == unix.ENODEV:
		return "this kernel has no such file system, or its module isn't loaded"
	case s.Stage == "mount" && s.Errno == unix.EINVAL && strings.HasSuffix(s.What, ")"):
		return "the file system refuses its options"
	case s.Stage == "mask" && s.Errno == unix.ENOENT && strings.HasSuffix(s.What, "/null"):
		return "masked paths are covered with it; what is mounted at /dev must have it"
	case s.Errno == unix.ELOOP && strings.HasSuffix(s.What, "/null"):
		return "it is a symbolic link, which could lead to what shall be hidden; the container needs a null device there"
	case s.Stage == "namespace" && s.Errno == unix.ENOENT && strings.HasPrefix(s.What, sysctlStep):
		return "this kernel has no such setting in its namespaces"
	case s.Stage == "namespace" && s.Errno == unix.EINVAL && strings.HasPrefix(s.What, sysctlStep):
		return "it refuses the value"
	case s.Stage == "namespace" && s.Errno == unix.EINVAL && strings.Contains(s.What, "name "):
		return "a name has 64 bytes at most"
	case s.Stage == "pivot" && s.Errno == unix.EINVAL:
		return "the machine's root can't be left, as it is the kernel's first file system; --no-pivot covers it instead"
	case s.Stage == "keyring" && s.Errno == unix.EDQUOT:
		return "there are too many; see /proc/sys/kernel/keys, or --no-new-keyring"
	}
	return ""
}

const sysctlStep = "sysctl "
