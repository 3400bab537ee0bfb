package policy

import (
	"path"
	"strings"

	"github.com/kilnbuild/kiln/internal/giturl"
	"github.com/kilnbuild/kiln/ops/source/registry"
)

// Full is the form of a source's identifier that rules are written for: images
// with registry and tag, repositories with host and path alone. What can't be
// read stays as it is: the source says what is wrong with it.
func Full(identifier string) string {
	scheme, name, _ := strings.Cut(identifier, "://")
	switch scheme {
	case "docker-image", "docker-image+blob":
		if ref, err := registry.ParseReference(name); err == nil {
			return scheme + "://" + ref.String()
		}
	case "git":
		u, err := giturl.Parse(name)
		if err != nil {
			u, err = giturl.Parse("https://" + name)
		}
		if err == nil {
			return scheme + "://" + repository(u)
		}
	}
	return identifier
}

func repository(u *giturl.URL) string {
	name := u.Host + path.Join("/", u.Path)
	if u.Ref == "" && u.Subdir == "" {
		return name
	}
	name += "#" + u.Ref
	if u.Subdir != "" {
		name += ":" + u.Subdir
	}
	return name
}
