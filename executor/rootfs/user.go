package rootfs

import (
	"errors"
	"fmt"
	"io"
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
	u, err := r.lookup(name)
	if err != nil && name != "" {
		return User{}, fmt.Errorf("look up user %q: %w", name, err)
	}
	if !slices.Contains(u.Groups, u.GID) {
		u.Groups = append([]uint32{u.GID}, u.Groups...)
	}
	u.Home = r.home(u.UID)
	return u, nil
}

func (r Root) lookup(name string) (User, error) {
	if uid, gid, ok := numeric(name); ok {
		return User{UID: uid, GID: gid}, nil
	}
	if name == "" {
		name = "0"
	}
	passwd, err := r.optional("/etc/passwd")
	if err != nil {
		return User{}, err
	}
	defer passwd.Close()
	group, err := r.optional("/etc/group")
	if err != nil {
		return User{}, err
	}
	defer group.Close()
	found, err := user.GetExecUser(name, nil, passwd, group)
	if err != nil {
		return User{}, err
	}
	u := User{UID: uint32(found.Uid), GID: uint32(found.Gid)}
	for _, g := range found.Sgids {
		u.Groups = append(u.Groups, uint32(g))
	}
	return u, nil
}

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
		return uint32(n), err == nil
	}
	uid, ok1 := id(u)
	gid, ok2 := id(g)
	return uid, gid, ok1 && ok2
}

// home returns the home directory of uid; "/" if the passwd file names none or
// can't be used.
func (r Root) home(uid uint32) string {
	passwd, err := r.openUserFile("/etc/passwd")
	if err != nil {
		return "/"
	}
	defer passwd.Close()
	list, err := user.ParsePasswdFilter(passwd, func(u user.User) bool { return u.Uid == int(uid) })
	if err != nil || len(list) == 0 || list[0].Home == "" {
		return "/"
	}
	return list[0].Home
}

// optional opens a user file; a missing one counts as empty.
func (r Root) optional(name string) (io.ReadCloser, error) {
	f, err := r.openUserFile(name)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return io.NopCloser(strings.NewReader("")), nil
	}
	return f, err
}
