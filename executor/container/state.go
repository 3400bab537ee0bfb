//go:build linux && (amd64 || arm64)

package container

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Status is where a container is in its life.
type Status int

// Statuses.
const (
	Creating Status = iota
	Created
	Running
	Paused
	Stopped
)

func (s Status) String() string {
	return [...]string{"creating", "created", "running", "paused", "stopped"}[s]
}

// Errors that callers branch on. Their texts are what users of runc look for.
var (
	ErrNotExist   = errors.New("container does not exist")
	ErrExist      = errors.New("container with given ID already exists")
	ErrNotRunning = errors.New("container not running")
)

// StatusError is an operation on a container whose status doesn't allow it.
type StatusError struct {
	Op, ID string
	Status Status
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("cannot %s container %s: it is %s", e.Op, e.ID, e.Status)
}

// Is makes an ended container one that isn't running.
func (e *StatusError) Is(target error) bool { return target == ErrNotRunning && e.Status == Stopped }

const (
	stateFile = "state.json"
	gateFile  = "exec.fifo"
)

// Runtime manages the containers below a directory. All methods, and those of
// its containers, are safe for concurrent use, by several processes too.
type Runtime struct {
	root string
	// Systemd connects to the machine's systemd, for containers whose cgroups it
	// is to manage; nil if there are none.
	Systemd func(context.Context) (Units, error)
	// Warn is told of what doesn't keep an operation from being done: capabilities
	// that can't be granted, and poststop hooks that failed. With nil, these are
	// errors of the operation.
	Warn func(error)
}

// New makes a runtime of the directory root, which is made when needed.
func New(root string) *Runtime { return &Runtime{root: root} }

// Container is a container that was created and not yet deleted.
type Container struct {
	dir     string
	systemd func(context.Context) (Units, error)
	warn    func(error)
	started bool // its unit, by this process
	hooked  bool // hooks were run before it was complete, by this process
	record
}

// record is what is written down of a container.
type record struct {
	ID        string      `json:"id"`
	Bundle    string      `json:"bundle"`
	Spec      *specs.Spec `json:"spec"`
	Pid       int         `json:"init_process_pid"`
	StartTime uint64      `json:"init_process_start"` // in ticks since boot
	Created   time.Time   `json:"created"`
	Keyring   string      `json:"keyring,omitempty"`
	Groups    groups      `json:"cgroups"`
	Unit      string      `json:"unit,omitempty"` // of systemd
	Slice     string      `json:"slice,omitempty"`
}

var validID = regexp.MustCompile(`^[\w+.-]+$`)

func (r *Runtime) dir(id string) (string, error) {
	if !validID.MatchString(id) || id == "." || id == ".." {
		return "", fmt.Errorf("invalid container ID %q: only letters, digits and _ + - . are allowed", id)
	}
	return filepath.Join(r.root, id), nil
}

// Load returns an existing container, or ErrNotExist.
func (r *Runtime) Load(id string) (*Container, error) {
	dir, err := r.dir(id)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %q", ErrNotExist, id)
	}
	c := &Container{dir: dir, systemd: r.Systemd, warn: r.Warn, record: record{ID: id}}
	b, err := os.ReadFile(filepath.Join(dir, stateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return c, nil // creating, or what a creator that was killed left
	}
	if err != nil {
		return nil, fmt.Errorf("read state of container %s: %w", id, err)
	}
	if err := json.Unmarshal(b, &c.record); err != nil {
		return nil, fmt.Errorf("read state of container %s: %s: %w", id, filepath.Join(dir, stateFile), err)
	}
	return c, nil
}

// List returns all containers, by their ids.
func (r *Runtime) List() ([]*Container, error) {
	entries, err := os.ReadDir(r.root)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	var list []*Container
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		c, err := r.Load(e.Name())
		if errors.Is(err, ErrNotExist) {
			continue // deleted meanwhile
		}
		if err != nil {
			return nil, err
		}
		list = append(list, c)
	}
	return list, nil
}

// save writes the record down, whole or not at all.
func (c *Container) save() error {
	b, err := json.Marshal(c.record)
	if err != nil {
		return fmt.Errorf("encode state of container %s: %w", c.ID, err)
	}
	f, err := os.CreateTemp(c.dir, stateFile)
	if err != nil {
		return fmt.Errorf("write state of container %s: %w", c.ID, err)
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), filepath.Join(c.dir, stateFile))
	}
	if err != nil {
		return fmt.Errorf("write state of container %s: %w", c.ID, err)
	}
	return nil
}

func (c *Container) gate() string { return filepath.Join(c.dir, gateFile) }

// Status looks what the container's status is now.
func (c *Container) Status() (Status, error) {
	if c.Pid == 0 {
		return Creating, nil
	}
	alive, err := c.alive()
	if err != nil {
		return 0, err
	}
	if !alive {
		return Stopped, nil
	}
	frozen, err := c.Groups.frozen()
	switch {
	case err != nil:
		return 0, err
	case frozen: // a created one, too: it can't be started until it is resumed
		return Paused, nil
	}
	if _, err := os.Stat(c.gate()); err == nil {
		return Created, nil
	}
	return Running, nil
}

// in returns an error unless the status is one of allowed.
func (c *Container) in(op string, allowed ...Status) (Status, error) {
	s, err := c.Status()
	if err == nil && !slices.Contains(allowed, s) {
		err = &StatusError{Op: op, ID: c.ID, Status: s}
	}
	return s, err
}

// alive says whether the first process is still there. Another one with its
// number began at another time.
func (c *Container) alive() (bool, error) {
	state, start, err := processStat(c.Pid)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at process %d of container %s: %w", c.Pid, c.ID, err)
	}
	return start == c.StartTime && state != 'Z' && state != 'X', nil
}

// processStat reads the state and the start time of a process.
func processStat(pid int) (state byte, start uint64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0, err
	}
	// The second field is a name that may have spaces and parentheses.
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	const startField = 22 - 3
	if len(fields) <= startField {
		return 0, 0, fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields)+2)
	}
	start, err = strconv.ParseUint(fields[startField], 10, 64)
	return fields[0][0], start, err
}

// State is what runc tells of a container.
type State struct {
	Version     string            `json:"ociVersion"`
	ID          string            `json:"id"`
	Pid         int               `json:"pid"`
	Status      string            `json:"status"`
	Bundle      string            `json:"bundle"`
	Rootfs      string            `json:"rootfs"`
	Created     time.Time         `json:"created"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Owner       string            `json:"owner"` // empty; it is the caller's to find out
}

// State describes the container.
func (c *Container) State() (State, error) {
	status, err := c.Status()
	if err != nil {
		return State{}, err
	}
	s := State{ID: c.ID, Pid: c.Pid, Status: status.String(), Bundle: c.Bundle, Created: c.Created, Version: specs.Version}
	if status == Stopped {
		s.Pid = 0
	}
	if c.Spec != nil {
		s.Version, s.Annotations, s.Rootfs = c.Spec.Version, c.Spec.Annotations, rootDir(c.Spec, c.Bundle)
	}
	return s, nil
}

func rootDir(s *specs.Spec, bundle string) string {
	if filepath.IsAbs(s.Root.Path) {
		return filepath.Clean(s.Root.Path)
	}
	return filepath.Join(bundle, s.Root.Path)
}
