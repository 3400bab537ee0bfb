package git

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/kilnbuild/kiln/internal/thread"
	"golang.org/x/sys/unix"
)

const (
	// grace is how long git may take to end when it is told to.
	grace = 5 * time.Second
	// maxOutput bounds what git answers on its standard output.
	maxOutput = 16 << 20
	// maxErrors bounds what is kept of git's messages for an error.
	maxErrors = 8 << 10
	// remoteProtocols are those that repositories and submodules are fetched by.
	remoteProtocols = "http:https:git:ssh"
)

// command is one run of git. Nothing that the machine or the user of the daemon
// has configured applies to it, it runs no hooks, asks no credential helpers and
// no terminal, and it speaks only the protocols that it is given.
type command struct {
	args      []string
	dir       string // where it runs; "" is where there is no repository
	bare      string // the repository, if it isn't the one in dir
	protocols string // "" is none
	access    *access
	stall     time.Duration // without a message for so long it is ended; 0 is never
	log       io.Writer     // gets git's messages; may be nil
	advice    bool
}

// fixed is the configuration of every run. It comes through the environment, so
// that no secret shows in arguments or is stored.
var fixed = []setting{
	{"core.hooksPath", os.DevNull},
	{"core.fsmonitor", "false"},
	{"core.askPass", ""},
	{"core.logAllRefUpdates", "false"},
	{"credential.helper", ""},
	{"gc.auto", "0"},
	{"maintenance.auto", "false"},
	{"init.defaultBranch", "master"},
	{"init.templateDir", ""},
	{"submodule.recurse", "false"},
	{"fetch.recurseSubmodules", "false"},
}

type setting struct{ name, value string }

// run returns what git prints. The error holds its messages.
func (c command) run(ctx context.Context) ([]byte, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	cmd := exec.CommandContext(ctx, "git", c.args...)
	if errors.Is(cmd.Err, exec.ErrNotFound) {
		return nil, errors.New("git sources need the program git, which this machine doesn't have; install the package git")
	}
	cmd.Dir, cmd.Env = c.dir, c.env()
	if cmd.Dir == "" {
		cmd.Dir = "/proc" // not even a repository at / is looked for from here
	}
	out := &output{}
	messages := &messages{to: c.log, hide: c.access.hidden()}
	if c.stall > 0 {
		timer := time.AfterFunc(c.stall, func() { cancel(fmt.Errorf("the server sent nothing for %s", c.stall)) })
		defer timer.Stop()
		touch := func() { timer.Reset(c.stall) }
		out.touch, messages.touch = touch, touch
	}
	cmd.Stdout, cmd.Stderr = out, messages
	err := runGroup(cmd)
	messages.end()
	if err == nil {
		return out.Bytes(), nil
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return nil, &runError{what: c.args[0], err: err, messages: messages.String()}
}

func (c command) env() []string {
	env := []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + os.DevNull, "LC_ALL=C",
		"GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=" + os.DevNull, "GIT_ATTR_NOSYSTEM=1",
		"GIT_TERMINAL_PROMPT=0", "GIT_NO_REPLACE_OBJECTS=1", "GIT_ALLOW_PROTOCOL=" + c.protocols,
		"GIT_SSH_COMMAND=" + c.access.ssh(),
	}
	for _, name := range []string{"http_proxy", "https_proxy", "no_proxy", "all_proxy"} {
		for _, name := range []string{name, strings.ToUpper(name)} {
			if v, ok := os.LookupEnv(name); ok {
				env = append(env, name+"="+v)
			}
		}
	}
	if c.bare != "" {
		env = append(env, "GIT_DIR="+c.bare)
	}
	settings := append([]setting{{"advice.detachedHead", strconv.FormatBool(c.advice)}}, fixed...)
	if c.access != nil {
		env = append(env, c.access.env...)
		settings = append(settings, c.access.settings...)
	}
	env = append(env, fmt.Sprintf("GIT_CONFIG_COUNT=%d", len(settings)))
	for i, s := range settings {
		env = append(env, fmt.Sprintf("GIT_CONFIG_KEY_%d=%s", i, s.name), fmt.Sprintf("GIT_CONFIG_VALUE_%d=%s", i, s.value))
	}
	return env
}

// runGroup runs cmd in a process group of its own, which ends with the context
// of cmd. New files get the usual permissions, whatever the daemon's umask is.
func runGroup(cmd *exec.Cmd) error {
	var kill *time.Timer
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	cmd.WaitDelay = 2 * grace
	cmd.Cancel = func() error {
		group := -cmd.Process.Pid
		kill = time.AfterFunc(grace, func() { unix.Kill(group, unix.SIGKILL) })
		return unix.Kill(group, unix.SIGTERM)
	}
	var err error
	// The thread ends after the process, which would be killed with it.
	thread.Run(func() {
		if err = unix.Unshare(unix.CLONE_FS); err != nil {
			err = fmt.Errorf("umask of its own: %w", err)
			return
		}
		unix.Umask(0o022)
		err = cmd.Run()
		if kill != nil {
			kill.Stop()
		}
	})
	return err
}

// output holds what git prints on its standard output.
type output struct {
	bytes.Buffer
	touch func()
}

func (o *output) Write(p []byte) (int, error) {
	if o.touch != nil {
		o.touch()
	}
	if o.Len()+len(p) > maxOutput {
		return 0, fmt.Errorf("git printed more than %d bytes", maxOutput)
	}
	return o.Buffer.Write(p)
}

// messages passes git's messages on, line by line, and keeps the last. Of a line
// that git writes over and over to show progress only the last state counts. What
// servers say may hold the secret that they were told.
type messages struct {
	to    io.Writer
	hide  *strings.Replacer
	touch func()

	mu   sync.Mutex // guards the fields below
	line []byte
	last []byte
}

func (m *messages) Write(p []byte) (int, error) {
	if m.touch != nil {
		m.touch()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.line = append(m.line, p...)
	for {
		i := bytes.IndexByte(m.line, '\n')
		if i < 0 && len(m.line) > maxErrors {
			i = len(m.line) - 1
		}
		if i < 0 {
			return len(p), nil
		}
		m.passLocked(m.line[:i+1])
		m.line = append([]byte(nil), m.line[i+1:]...)
	}
}

func (m *messages) passLocked(p []byte) {
	if i := bytes.LastIndexByte(bytes.TrimRight(p, "\r\n"), '\r'); i >= 0 {
		p = p[i+1:]
	}
	text := m.hide.Replace(string(p))
	if m.to != nil {
		m.to.Write([]byte(text)) // a build's log takes everything
	}
	m.last = append(m.last, text...)
	if n := len(m.last) - maxErrors; n > 0 {
		m.last = append([]byte(nil), m.last[n:]...)
	}
}

func (m *messages) end() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.line) > 0 {
		m.passLocked(m.line)
		m.line = nil
	}
}

func (m *messages) String() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return string(m.last)
}

// runError is a run of git that failed.
type runError struct {
	what     string
	err      error
	messages string
}

func (e *runError) Unwrap() error { return e.err }

func (e *runError) Error() string {
	text := fmt.Sprintf("git %s: %v", e.what, e.err)
	var said []string
	for line := range strings.Lines(e.messages) {
		if line = strings.TrimSpace(line); line != "" {
			said = append(said, line)
		}
	}
	if len(said) > 0 {
		text += ": " + strings.Join(said, "; ")
	}
	return text + e.advice()
}

// advice is what to do about it, where that is known.
func (e *runError) advice() string {
	switch {
	case e.says("cannot run ssh"):
		return "; install the package openssh-client on the daemon's machine"
	case e.says("'remote-http"):
		return "; git on the daemon's machine is without HTTP: install the complete package git"
	case e.says("could not read Username"), e.says("Authentication failed"):
		return "; give a token with --secret id=GIT_AUTH_TOKEN"
	case e.says("Host key verification failed"):
		return "; the host's key isn't among the known hosts that the client sent"
	case e.says("transport '") && e.says("not allowed"):
		return "; only http, https, git and ssh are fetched from"
	}
	return ""
}

func (e *runError) says(text string) bool { return strings.Contains(e.messages, text) }
