package files

import (
	"bytes"
	"io/fs"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// modeBits are the permission bits that Go has in other places than chmod(2).
var modeBits = [...]struct {
	unix uint32
	mode fs.FileMode
}{{unix.S_ISUID, fs.ModeSetuid}, {unix.S_ISGID, fs.ModeSetgid}, {unix.S_ISVTX, fs.ModeSticky}}

// Perm returns the permission bits of m, those of set-id and sticky among them, as
// chmod(2) takes them.
func Perm(m fs.FileMode) uint32 {
	perm := uint32(m.Perm())
	for _, b := range modeBits {
		if m&b.mode != 0 {
			perm |= b.unix
		}
	}
	return perm
}

// GoPerm is the inverse of Perm: permission bits of chmod(2) as Go has them.
func GoPerm(perm uint32) fs.FileMode {
	m := fs.FileMode(perm & 0o777)
	for _, b := range modeBits {
		if perm&b.unix != 0 {
			m |= b.mode
		}
	}
	return m
}

// Umask returns the bits that new files of this process don't get, all if it isn't
// known.
func Umask() uint32 {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0o777
	}
	for line := range bytes.Lines(status) {
		if v, ok := bytes.CutPrefix(line, []byte("Umask:")); ok {
			if n, err := strconv.ParseUint(string(bytes.TrimSpace(v)), 8, 32); err == nil {
				return uint32(n)
			}
		}
	}
	return 0o777
}
