package build

import (
	"os"

	"github.com/kilnbuild/kiln/snapshot"
	"golang.org/x/sys/unix"
)

// openIn opens name inside v for reading; links are resolved inside the root.
func openIn(v *snapshot.View, name string) (*os.File, error) {
	how := &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	fd, err := unix.Openat2(v.FD(), name, how)
	if err != nil {
		return nil, pathError("open", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}
