package store

import (
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// Size is what the database takes on disk, with its journal and what was set
// aside, and what its reserve takes, in bytes of allocated blocks; and the paths
// of all these.
func (d *DB) Size() (database, reserve int64, paths []string, err error) {
	paths, err = d.asides()
	if err != nil {
		return 0, 0, nil, err
	}
	paths = append(paths, d.path, d.journal.path, d.reservePath())
	for _, path := range paths {
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil && !errors.Is(err, syscall.ENOENT) {
			return 0, 0, nil, fmt.Errorf("measure %s: %w", path, err)
		}
		if size := st.Blocks * 512; path == d.reservePath() {
			reserve += size
		} else {
			database += size
		}
	}
	return database, reserve, paths, nil
}
