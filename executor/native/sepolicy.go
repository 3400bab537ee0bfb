//go:build linux && (amd64 || arm64)

package native

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// sePolicy answers what SELinux allows. A refused transition shows as a program
// that can't be executed: asked before, the reason is known.
type sePolicy struct {
	dir string                                  // what selinuxfs has
	own func() (string, error)                  // label of this process
	ask func(dir, query string) (string, error) // decisions
}

var kernelsPolicy = sePolicy{dir: selinuxFS, own: ownLabel, ask: askPolicy}

// askPolicy has the kernel decide: it answers in the file that was asked in.
func askPolicy(dir, query string) (string, error) {
	f, err := os.OpenFile(filepath.Join(dir, "access"), os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if _, err := f.WriteString(query); err != nil {
		return "", err
	}
	var answer [200]byte
	n, err := f.Read(answer[:])
	return string(answer[:n]), err
}

// mayExecute fails if the policy is enforced and keeps this process from
// executing any program as label.
func (p sePolicy) mayExecute(label string, noNewPrivileges bool) error {
	enforced, err := os.ReadFile(filepath.Join(p.dir, "enforce"))
	if err != nil || strings.TrimSpace(string(enforced)) != "1" {
		return nil
	}
	own, err := p.own()
	if err != nil || own == label {
		return nil
	}
	type need struct{ to, class, permission, why string }
	needs := []need{{own, "process", "setexec", ""}, {label, "process", "transition", ""}}
	if noNewPrivileges {
		needs = append(needs, need{label, "process2", "nnp_transition", ", which process.noNewPrivileges takes"})
	}
	for _, n := range needs {
		// Who may not ask learns it when the label is used.
		if allowed, err := p.allows(own, n.to, n.class, n.permission); err == nil && !allowed {
			return fmt.Errorf("SELinux's policy on this machine forbids it to processes with the label %s, as this one: "+
				"they lack the permission %s of the class %s%s", own, n.permission, n.class, n.why)
		}
	}
	return nil
}

// allows asks whether from has a permission on to. A policy with other classes is
// an error.
func (p sePolicy) allows(from, to, class, permission string) (bool, error) {
	classDir := filepath.Join(p.dir, "class", class)
	number, err := readNumber(filepath.Join(classDir, "index"))
	if err != nil {
		return false, err
	}
	bit, err := readNumber(filepath.Join(classDir, "perms", permission))
	if err != nil {
		return false, err
	}
	answer, err := p.ask(p.dir, fmt.Sprintf("%s %s %d", from, to, number))
	if err != nil {
		return false, err
	}
	// allowed decided auditallow auditdeny number flags
	var allowed, decided, auditAllow, auditDeny, seq, flags uint32
	if _, err := fmt.Sscanf(answer, "%x %x %x %x %d %x", &allowed, &decided, &auditAllow, &auditDeny, &seq, &flags); err != nil {
		return false, fmt.Errorf("decision %q: %w", answer, err)
	}
	const permissive = 1 // the domain alone
	return flags&permissive != 0 || bit >= 1 && bit <= 32 && allowed>>(bit-1)&1 == 1, nil
}

func readNumber(file string) (int, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// execError is err of executing p's program. With a label, the reason may be one
// that the kernel tells its log alone.
func execError(p *specs.Process, err error) *ExecError {
	if p.SelinuxLabel != "" && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM)) {
		err = fmt.Errorf("%w, perhaps by SELinux, whose policy may not let a file with its label be executed as %s: ausearch -m avc, or dmesg, shows what it has denied", err, p.SelinuxLabel)
	}
	return &ExecError{p.Args[0], err}
}
