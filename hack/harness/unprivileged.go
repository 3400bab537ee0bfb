package harness

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
)

// Unprivileged is an ordinary user that the machine doesn't know: its name and
// its ranges of ids are in files that only its own processes see in place of
// those in /etc, in a mount namespace that ends with them.
type Unprivileged struct {
	Home string
	dir  string // the files
	env  []string
}

// UnprivilegedID is the user's and its group's number.
const UnprivilegedID = 1617263

const (
	unprivilegedName = "kiln-test"
	subIDs           = 1617300
)

// asUser lays the files of $0 over /etc, where not all of them need be, and
// becomes the user $1.
const asUser = `set -eu
mount -t overlay -o "ro,lowerdir=$0:/etc" kiln-etc /etc
uid=$1
shift
exec setpriv --reuid "$uid" --regid "$uid" --clear-groups -- "$@"
`

// NewUnprivileged makes the files below dir, which the user must be able to
// reach. It may map count ids besides its own.
func NewUnprivileged(dir string, count int) (*Unprivileged, error) {
	for _, program := range []string{"unshare", "setpriv", "mount", "newuidmap", "newgidmap", "nsenter"} {
		if _, err := exec.LookPath(program); err != nil {
			return nil, fmt.Errorf("%w: run hack/deps", err)
		}
	}
	u := &Unprivileged{Home: filepath.Join(dir, "home"), dir: filepath.Join(dir, "etc")}
	for _, d := range []string{u.Home, u.dir, u.runtimeDir()} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return nil, err
		}
	}
	if err := u.Own(u.Home, u.runtimeDir()); err != nil {
		return nil, err
	}
	passwd, err := os.ReadFile("/etc/passwd")
	if err != nil {
		return nil, err
	}
	id := strconv.Itoa(UnprivilegedID)
	files := map[string]string{"passwd": string(passwd) + unprivilegedName + ":x:" + id + ":" + id + "::" + u.Home + ":/bin/sh\n", "subuid": "", "subgid": ""}
	if count > 0 {
		files["subuid"] = fmt.Sprintf("%s:%d:%d\n", unprivilegedName, subIDs, count)
		files["subgid"] = files["subuid"]
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(u.dir, name), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	u.env = []string{"HOME=" + u.Home, "XDG_RUNTIME_DIR=" + u.runtimeDir(), "XDG_DATA_HOME=", "XDG_CONFIG_HOME=", "USER=" + unprivilegedName, "LOGNAME=" + unprivilegedName}
	return u, nil
}

func (u *Unprivileged) runtimeDir() string { return filepath.Join(filepath.Dir(u.Home), "run") }

// Own makes files and directories the user's.
func (u *Unprivileged) Own(paths ...string) error {
	for _, p := range paths {
		if err := os.Lchown(p, UnprivilegedID, UnprivilegedID); err != nil {
			return err
		}
	}
	return nil
}

// Command is one that the user runs. Its process is that of the program.
func (u *Unprivileged) Command(program string, args ...string) *exec.Cmd {
	cmd := exec.Command("unshare", append([]string{"--mount", "sh", "-c", asUser, u.dir, strconv.Itoa(UnprivilegedID), program}, args...)...)
	cmd.Env = append(os.Environ(), u.env...)
	return cmd
}
