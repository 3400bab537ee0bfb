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
	}
	return err
}
