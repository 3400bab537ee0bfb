package export

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/platforms"
)

// annotations are by where they go, then by platform ("" is every one), then by
// name (EXP-028).
type annotations map[string]map[string]map[string]string

const (
	onManifest           = "manifest"
	onManifestDescriptor = "manifest-descriptor"
	onIndex              = "index"
	onIndexDescriptor    = "index-descriptor"
)

var annotationKey = regexp.MustCompile(`^annotation(?:-(manifest|manifest-descriptor|index|index-descriptor))?(?:\[([^\]]*)\])?\.(.+)$`)

// add reads an attribute such as annotation-manifest[linux/amd64].KEY.
func (a *annotations) add(key, value string) error {
	m := annotationKey.FindStringSubmatch(key)
	if m == nil {
		return fmt.Errorf("annotation %q: must be annotation[-manifest|-manifest-descriptor|-index|-index-descriptor][[PLATFORM]].KEY", key)
	}
	where, platform, name := m[1], m[2], m[3]
	if where == "" {
		where = onManifest
	}
	if platform != "" {
		p, err := platforms.Parse(platform)
		if err != nil {
			return fmt.Errorf("annotation %q: %w", key, err)
		}
		platform = platforms.FormatAll(platforms.Normalize(p))
	}
	if *a == nil {
		*a = annotations{}
	}
	if (*a)[where] == nil {
		(*a)[where] = map[string]map[string]string{}
	}
	if (*a)[where][platform] == nil {
		(*a)[where][platform] = map[string]string{}
	}
	(*a)[where][platform][name] = value
	return nil
}

// with returns a with the annotations that the result's metadata carries on top.
// Keys of another form are some frontend's own.
func (a annotations) with(metadata map[string][]byte) (annotations, error) {
	out := annotations{}
	for where, byPlatform := range a {
		out[where] = map[string]map[string]string{}
		for p, kv := range byPlatform {
			out[where][p] = maps.Clone(kv)
		}
	}
	for k, v := range metadata {
		if annotationKey.MatchString(k) {
			if err := out.add(k, string(v)); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

// at returns the annotations for one place of one platform; nil if none. An
// index is of no one platform: it takes those of all.
func (a annotations) at(where, platform string) map[string]string {
	from := []string{"", platform}
	if strings.HasPrefix(where, onIndex) {
		from = slices.Sorted(maps.Keys(a[where]))
	}
	var out map[string]string
	for _, p := range from {
		for k, v := range a[where][p] {
			if out == nil {
				out = map[string]string{}
			}
			out[k] = v
		}
	}
	return out
}

// check refuses annotations of platforms that the result doesn't have, of an
// index where there is none, and of what has none in Docker's media types.
func (a annotations) check(ids map[string]bool, index, oci bool) error {
	for _, where := range slices.Sorted(maps.Keys(a)) {
		switch {
		case !oci && where != onManifest:
			return fmt.Errorf("%s annotations need oci-mediatypes=true", where)
		case !index && strings.HasPrefix(where, onIndex):
			return fmt.Errorf("%s annotations need a result of several platforms", where)
		}
		for _, p := range slices.Sorted(maps.Keys(a[where])) {
			if p != "" && !ids[p] {
				return fmt.Errorf("annotation for platform %s: the result has no such platform", p)
			}
		}
	}
	return nil
}
