package filetree

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"
)

// Files that User and Group read.
const (
	PasswdFile = "/etc/passwd"
	GroupFile  = "/etc/group"
)

const maxUsers = 10 << 20 // bytes of such a file

// User looks up a user and its group (LLB-062). A name that isn't there, or a tree
// without such names, is 0.
func (r Root) User(name string) (owner Owner, err error) {
	err = r.parse(PasswdFile, func(f io.Reader) error {
		users, err := user.ParsePasswdFilter(f, func(e user.User) bool { return e.Name == name })
		if err == nil && len(users) > 0 {
			owner = Owner{users[0].Uid, users[0].Gid}
		}
		return err
	})
	return owner, err
}

// Group looks up a group as User does a user.
func (r Root) Group(name string) (gid int, err error) {
	err = r.parse(GroupFile, func(f io.Reader) error {
		groups, err := user.ParseGroupFilter(f, func(e user.Group) bool { return e.Name == name })
		if err == nil && len(groups) > 0 {
			gid = groups[0].Gid
		}
		return err
	})
	return gid, err
}

// parse has read parse the file of users or groups at p, if there is one.
func (r Root) parse(p string, read func(io.Reader) error) error {
	f, err := r.openResolved(p)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	limited := &io.LimitedReader{R: f, N: maxUsers + 1}
	if err := read(limited); err != nil {
		return fmt.Errorf("read %s: %w", p, err)
	}
	if limited.N == 0 {
		return fmt.Errorf("read %s: it exceeds %d bytes", p, maxUsers)
	}
	return nil
}

func (r Root) openResolved(p string) (*os.File, error) {
	at, err := r.resolve(p, true)
	if err != nil {
		return nil, err
	}
	return r.openRegular(at)
}
