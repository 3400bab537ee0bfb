package executor

import (
	"fmt"
	"regexp"
	"strings"
	"sync"
)

// patterns are compiled when the first step fails: a start shouldn't wait for it.
func patterns(all ...string) func() []*regexp.Regexp {
	return sync.OnceValue(func() (compiled []*regexp.Regexp) {
		for _, one := range all {
			compiled = append(compiled, regexp.MustCompile(one))
		}
		return compiled
	})
}

// shellComplaints are how shells and the like say what they could not run.
var shellComplaints = patterns(
	`(?:line \d+: |: \d+: |^\S*sh: )(\S+): (?:command not found|not found|No such file or directory|Permission denied|Exec format error|cannot execute.*|bad interpreter.*)`,
	`exec: "([^"]+)"`,
	`^env: ['‘"]?([^'’":]+)['’"]?: (?:No such file or directory|Permission denied|Exec format error)`,
	`can't execute '([^']+)'`,
)

// inShell looks at what a shell could not run: it exits with 127 or 126 and names
// the program in its last words.
func (f *failure) inShell() Cause {
	if len(f.stderr) == 0 {
		return Cause{}
	}
	last := f.stderr[len(f.stderr)-1]
	if f.exit.code != codeNotFound && f.exit.code != codeNotExecutable {
		return Cause{}
	}
	for _, re := range shellComplaints() {
		m := re.FindStringSubmatch(last)
		if m == nil {
			continue
		}
		// The name is hearsay; whether what is said of it holds is looked up.
		at := f.find(m[1])
		if at == "" || !f.view.has(at) {
			c := f.noProgram(m[1])
			c.Printed = last
			return c
		}
		c := f.program(at, nil)
		if c.Kind == "" && strings.Contains(last, "Permission denied") {
			c = Cause{Kind: CausePermission, Text: fmt.Sprintf("user %s may not execute %s", f.user(), at)}
		}
		c.Printed = last
		return c
	}
	return Cause{}
}

// hints are what programs print, by what it most likely means.
var hints = []struct {
	words []string
	cause func(f *failure) Cause
}{
	{[]string{
		"emporary failure in name resolution", "emporary failure resolving", "ould not resolve host", "Couldn't resolve host", "ame or service not known",
		"nable to resolve host", ": bad address '", "no such host", "getaddrinfo EAI_AGAIN", "getaddrinfo ENOTFOUND", "Name does not resolve",
		"Could not resolve '", "nodename nor servname", "can't resolve '", "server misbehaving",
	}, (*failure).noName},
	{[]string{"error while loading shared libraries", "Error loading shared library"}, func(*failure) Cause {
		return Cause{Kind: CauseNoInterpreter, Text: "a shared library that the program is linked with isn't in the root file system; install it, or use a static binary"}
	}},
	{[]string{"Exec format error", "exec format error", "cannot execute binary file"}, func(f *failure) Cause {
		return Cause{Kind: CauseArchitecture, Text: "a program that it ran is not for this machine's architecture, or has no #! line; use one for this platform, or install an emulator (binfmt_misc, qemu-user-static)"}
	}},
	{[]string{"Read-only file system", "read-only file system"}, func(*failure) Cause {
		return Cause{Kind: CausePermission, Text: "it wrote to something that is mounted read-only: bind mounts of a step are, unless they say rw, and so are parts of /proc and /sys"}
	}},
	{[]string{"Operation not permitted", "operation not permitted", "(are you root?)"}, func(f *failure) Cause {
		if f.t.p.Security == SecurityInsecure {
			return Cause{Kind: CausePermission, Text: fmt.Sprintf("the kernel doesn't let user %s do that", f.user())}
		}
		return Cause{Kind: CausePolicy, Text: "the sandbox of steps (seccomp filter, capabilities, devices) refuses what it tried; " + insecureFix}
	}},
	{[]string{"Permission denied", "permission denied"}, func(f *failure) Cause {
		return Cause{Kind: CausePermission, Text: fmt.Sprintf("a file or directory may not be used by the step's user, %s; change its mode or owner, or the USER", f.user())}
	}},
}

// hint concludes from the last lines what happened.
func (f *failure) hint() Cause {
	for _, h := range hints {
		if printed := f.printed(h.words...); printed != "" {
			c := h.cause(f)
			c.Printed = printed
			return c
		}
	}
	return Cause{}
}

func (f *failure) noName() Cause {
	if f.t.p.Network == NetNone {
		return Cause{Kind: CauseDNS, Text: "the step has no network (--network=none), so that no name can be resolved; give it one, or do without"}
	}
	var servers []string
	for line := range strings.Lines(string(f.dns)) {
		if addr, ok := strings.CutPrefix(strings.TrimSpace(line), "nameserver "); ok {
			servers = append(servers, addr)
		}
	}
	asked := "its resolv.conf names no server"
	if len(servers) > 0 {
		asked = "it asks " + strings.Join(servers, ", ")
	}
	return Cause{Kind: CauseDNS, Text: asked + "; see that the name is right and the server can be reached from the machine, or set [dns] nameservers in the daemon's configuration"}
}
