package executor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/kilnbuild/kiln/snapshot"
	"github.com/moby/sys/mountinfo"
)

// removeBundle removes a bundle whose mounts are gone. It never descends into
// a directory: if one is still mounted, its content is not ours to remove.
func removeBundle(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove bundle: %w", err)
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, os.Remove(filepath.Join(dir, e.Name())))
	}
	errs = append(errs, os.Remove(dir))
	return errors.Join(errs...)
}

// removeBundles removes all bundles that a crash left in dir, with what is
// mounted there.
func removeBundles(dir string) error {
	if err := unmountAll(dir); err != nil {
		return fmt.Errorf("unmount old bundles: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove old bundles: %w", err)
	}
	for _, e := range entries {
		if err := removeBundle(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// unmountAll unmounts what is mounted at and below dir.
func unmountAll(dir string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return fmt.Errorf("find mounts in %s: %w", dir, err)
	}
	for i := len(mounts) - 1; i >= 0; i-- {
		if err := snapshot.Detach(mounts[i].Mountpoint); err != nil {
			return fmt.Errorf("unmount %s: %w", mounts[i].Mountpoint, err)
		}
	}
	return nil
}
