package dockerfile

import (
	"errors"
	"fmt"
	"path"
	"strings"
)

// Paths in a Dockerfile are those of the platform the image is for. Everywhere
// else paths have forward slashes and no drive.

func toSlash(p, os string) string {
	if os != "windows" {
		return p
	}
	return strings.ReplaceAll(p, `\`, "/")
}

// withoutDrive removes the drive of a Windows path, which must be C:, and
// cleans it.
func withoutDrive(p, os string, keepSlash bool) (string, error) {
	if os != "windows" {
		return p, nil
	}
	p = toSlash(p, os)
	switch {
	case len(p) == 2 && p[1] == ':':
		return "", fmt.Errorf("no relative path specified in %q", p)
	case strings.HasPrefix(p, "//"):
		return "", fmt.Errorf("UNC path %q: UNC paths are not supported", p)
	}
	if drive, rest, ok := strings.Cut(p, ":"); ok {
		if !strings.EqualFold(drive, "c") {
			return "", errors.New("the specified path is not on the system drive (C:)")
		}
		p = rest
	}
	clean := path.Clean(p)
	if keepSlash && len(clean) > 1 && strings.HasSuffix(p, "/") {
		clean += "/"
	}
	return clean, nil
}

func isAbs(p, os string) bool {
	p, err := withoutDrive(p, os, false)
	return err == nil && path.IsAbs(p)
}

// resolvePath returns p as an absolute path, below dir if it is relative. With
// keepSlash, an end of "/" or "/." stays.
func resolvePath(dir, p, os string, keepSlash bool) (string, error) {
	orig := toSlash(p, os)
	dir, err := withoutDrive(dir, os, keepSlash)
	if err != nil {
		return "", err
	}
	if !path.IsAbs(dir) {
		dir = path.Join("/", dir)
	}
	if p == "" {
		p = dir
	}
	if p, err = withoutDrive(p, os, keepSlash); err != nil {
		return "", err
	}
	if !path.IsAbs(p) {
		p = path.Join(dir, p)
	}
	switch {
	case !keepSlash:
	case strings.HasSuffix(orig, "/") && !strings.HasSuffix(p, "/"):
		p += "/"
	case strings.HasSuffix(orig, "/.") && !strings.HasSuffix(p, "/."):
		p = strings.TrimSuffix(p, "/") + "/."
	}
	return p, nil
}

// destination resolves where ADD and COPY put things.
func (s *stage) destination(p string) (string, error) {
	os := s.platform.OS
	p, err := withoutDrive(p, os, true)
	if err != nil {
		return "", err
	}
	if isAbs(p, os) {
		return resolvePath("/", p, os, true)
	}
	if p == "." || p == "" {
		p = "./" // the directory, whatever it is
	}
	return resolvePath(s.state.GetDir(), p, os, true)
}

func fromSlash(p, os string) string {
	if os != "windows" {
		return p
	}
	return strings.ReplaceAll(p, "/", `\`)
}
