package store

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	asidePrefix = fileName + ".damaged-"
	asideTime   = "20060102T150405.000000"
	// keepAside is how long a database that was set aside is kept: long enough
	// for somebody to come and look at it.
	keepAside = 30 * 24 * time.Hour
)

// setAside renames the damaged database and puts another one in its place.
func (d *DB) setAside(why error) error {
	aside := filepath.Join(d.root.Name(), asidePrefix+time.Now().UTC().Format(asideTime))
	if err := os.Rename(d.path, aside); err != nil {
		return fmt.Errorf("set the database aside: %w (because: %w)", err, why)
	}
	return d.rebuild(fmt.Sprintf("the database was damaged (%v) and is set aside as %s", why, filepath.Base(aside)))
}

// asides are the databases that were set aside, the oldest first. Files that
// only look alike are somebody else's.
func (d *DB) asides() (paths []string, err error) {
	entries, err := os.ReadDir(d.root.Name())
	if err != nil {
		return nil, fmt.Errorf("list databases that were set aside: %w", err)
	}
	for _, e := range entries {
		if _, ok := setAsideAt(e.Name()); ok {
			paths = append(paths, filepath.Join(d.root.Name(), e.Name()))
		}
	}
	slices.Sort(paths) // as the times in their names
	return paths, nil
}

// setAsideAt is when the file of that name was set aside.
func setAsideAt(name string) (at time.Time, ok bool) {
	text, ok := strings.CutPrefix(name, asidePrefix)
	if !ok {
		return time.Time{}, false
	}
	at, err := time.Parse(asideTime, text)
	return at, err == nil
}

// dropAsides removes databases that were set aside: all but the newest one, and
// that one when it is older than keepAside. So damage that comes again and again
// doesn't fill the disk. What can't be removed is tried for at the next start.
func (d *DB) dropAsides(now time.Time) {
	paths, err := d.asides()
	if err != nil {
		d.warn("databases that were set aside stay", "error", err)
		return
	}
	for i, path := range paths {
		at, _ := setAsideAt(filepath.Base(path))
		why := fmt.Sprintf("it is older than %d days", keepAside/(24*time.Hour))
		if i < len(paths)-1 {
			why = "there is a newer one"
		} else if now.Sub(at) < keepAside {
			continue
		}
		if err := os.Remove(path); err != nil {
			d.warn("a damaged database that was set aside can't be removed", "path", path, "error", err)
			continue
		}
		d.warn("a damaged database that was set aside is removed", "path", path, "reason", why)
	}
}
