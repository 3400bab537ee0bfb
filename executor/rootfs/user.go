package rootfs

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"
)

// User is whom a process runs as.
type User struct {
	UID, GID uint32
	Groups   []uint32 // supplementary ones, with GID
	Home     string
}

// User looks up name, which is a name or number, or two separated by a colon:
// user and group. "" is root, whatever the passwd file is like.
func (r Root) User(name string) (User, error) {
	passwd, perr := r.readUserFile("/etc/passwd")
	u, err := r.lookup(name, passwd, perr)
	if err != nil && name != "" {
		return User{}, fmt.Errorf("look up user %q: %w", name, err)
	}
	if !slices.Contains(u.Groups, u.GID) {
		u.Groups = append([]uint32{u.GID}, u.Groups...)
	}
	u.Home = home(u.UID, passwd)
	return u, nil
}

func (r Root) lookup(name string, passwd []byte, err error) (User, error) {
	if uid, gid, ok := numeric(name); ok {
		return User{UID: uid, GID: gid}, nil
	}
	if name == "" {
		name = "0"
	}
	if err != nil {
		return User{}, err
	}
	group, err := r.readUserFile("/etc/group")
	if err != nil {
		return User{}, err
	}
	found, err := user.GetExecUser(name, nil, bytes.NewReader(passwd), bytes.NewReader(group))
	if err != nil {
		return User{}, err
	}
	for _, id := range append([]int{found.Uid, found.Gid}, found.Sgids...) {
		if id < 0 || id > maxID {
			return User{}, fmt.Errorf("the passwd or group file has the id %d for it, which is not between 0 and %d", id, maxID)
		}
	}
	u := User{UID: uint32(found.Uid), GID: uint32(found.Gid)}
	for _, g := range found.Sgids {
		u.Groups = append(u.Groups, uint32(g))
	}
	return u, nil
}

// maxID is the highest user and group. The next one is the kernel's word for
// leaving a process as it is, which is root.
const maxID = math.MaxUint32 - 1

// numeric parses "uid:gid", which needs no look-up. "root" counts as 0.
func numeric(name string) (uid, gid uint32, ok bool) {
	u, g, ok := strings.Cut(name, ":")
	if !ok {
		return 0, 0, false
	}
	id := func(s string) (uint32, bool) {
		if s == "root" {
			return 0, true
		}
		n, err := strconv.ParseUint(s, 10, 32)
		return uint32(n), err == nil && n <= maxID
	}
	uid, ok1 := id(u)
	gid, ok2 := id(g)
	return uid, gid, ok1 && ok2
}

// home returns the home directory of uid, "/" if passwd names none.
func home(uid uint32, passwd []byte) string {
	list, err := user.ParsePasswdFilter(bytes.NewReader(passwd), func(u user.User) bool { return u.Uid == int(uid) })
	if err != nil || len(list) == 0 || list[0].Home == "" {
		return "/"
	}
	return list[0].Home
}

// maxUserFile is the largest passwd or group file that is read.
const maxUserFile = 10 << 20

// readUserFile reads a file like /etc/passwd, which must be a regular one; a
// missing one is empty.
func (r Root) readUserFile(name string) ([]byte, error) {
	// Not opened yet: to open a device can do something.
	found, err := r.open(name, unix.O_PATH)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer unix.Close(found)
	var st unix.Stat_t
	if err := unix.Fstat(found, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("%s is not a regular file", name)
	}
	if st.Size > maxUserFile {
		return nil, fmt.Errorf("%q exceeds %d bytes", name, maxUserFile)
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", found), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(fd)
	buf := make([]byte, st.Size)
	for n := 0; n < len(buf); {
		m, err := unix.Read(fd, buf[n:])
		if err != nil && err != unix.EINTR {
			return nil, &os.PathError{Op: "read", Path: name, Err: err}
		}
		if m == 0 {
			return buf[:n], nil
		}
		n += max(m, 0)
	}
	return buf, nil
}
