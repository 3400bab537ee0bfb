package rootless

import (
	"os"
	"path/filepath"
	"strings"
)

// Paths are where a daemon and its clients look when nothing is said.
type Paths struct {
	Config  string
	Root    string
	Address string
}

// Machine are the paths of the machine's daemon.
func Machine() Paths {
	return Paths{Config: "/etc/buildkit/buildkitd.toml", Root: "/var/lib/kiln", Address: "unix:///run/buildkit/buildkitd.sock"}
}

// Defaults are those of this process: a user's own if it is an ordinary user's,
// or if its user has become root of a user namespace, which leaves USER as it
// was; else the machine's.
func Defaults() Paths {
	name := os.Getenv("USER")
	if os.Geteuid() != 0 || Here().Mapped() && name != "" && name != "root" {
		return User()
	}
	return Machine()
}

// User are the paths of a user's own daemon. What the environment says nothing of
// is the machine's.
func User() Paths {
	p := Machine()
	if dir := xdg("XDG_CONFIG_HOME", ".config"); dir != "" {
		p.Config = filepath.Join(dir, "buildkit", "buildkitd.toml")
	}
	if dir := xdg("XDG_DATA_HOME", ".local/share"); dir != "" {
		p.Root = filepath.Join(dir, "kiln")
	}
	if dir := xdg("XDG_RUNTIME_DIR", ""); dir != "" {
		p.Address = "unix://" + filepath.Join(dir, "buildkit", "buildkitd.sock")
	}
	return p
}

// xdg is the directory that the variable names, or one below the home directory,
// or "".
func xdg(variable, home string) string {
	if first, _, _ := strings.Cut(os.Getenv(variable), ":"); first != "" {
		return first
	}
	if h := os.Getenv("HOME"); h != "" && home != "" {
		return filepath.Join(h, home)
	}
	return ""
}
