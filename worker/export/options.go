package export

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/kilnbuild/kiln/cache"
)

// imageOptions are the attributes of the image family (EXP-010 to -031).
type imageOptions struct {
	names           []string // as given; "*" takes the frontend's
	push            bool
	pushByDigest    bool
	insecure        bool
	danglingPrefix  string
	danglingIfEmpty bool
	compression     cache.Compression
	epoch           epoch
	annotations     annotations
	metadata        map[string][]byte // overrides of the result's
}

// parseImageOptions reads attrs; typ is image, oci or docker.
func parseImageOptions(typ string, attrs map[string]string) (imageOptions, error) {
	o := imageOptions{compression: cache.Compression{Type: "gzip", OCI: true}, metadata: map[string][]byte{}}
	var unused bool // for what is accepted and changes nothing here
	tarred := true
	bools := map[string]*bool{
		"oci-mediatypes": &o.compression.OCI, "force-compression": &o.compression.Force,
		"oci-artifact": &unused, "attestation-inline": &unused, "prefer-nondist-layers": &unused,
		"rewrite-timestamp": &unused,
	}
	if typ == "image" {
		maps.Copy(bools, map[string]*bool{
			"push": &o.push, "push-by-digest": &o.pushByDigest, "registry.insecure": &o.insecure,
			"danging-name-empty-only": &o.danglingIfEmpty,
			"name-canonical":          &unused, "unpack": &unused, "store": &unused,
		})
	} else {
		bools["tar"] = &tarred
	}
	for _, k := range slices.Sorted(maps.Keys(attrs)) {
		v := attrs[k]
		if dst, ok := bools[k]; ok {
			if err := parseBool(k, v, dst); err != nil {
				return o, err
			}
			if k == "rewrite-timestamp" && *dst {
				return o, errors.New("rewrite-timestamp: this daemon does not rewrite the times of files in layers")
			}
			continue
		}
		if err := o.set(typ, k, v); err != nil {
			return o, err
		}
	}
	if !tarred {
		return o, fmt.Errorf("tar=false: this daemon sends %s results as one archive only", typ)
	}
	return o, o.check()
}

func (o *imageOptions) set(typ, k, v string) (err error) {
	switch {
	case k == "name":
		if v != "" {
			o.names = strings.Split(v, ",")
		}
	case k == "dangling-name-prefix" && typ == "image":
		o.danglingPrefix = v
	case k == "compression":
		o.compression.Type = v
	case k == "compression-level":
		level, err := strconv.Atoi(v)
		if err != nil {
			return fmt.Errorf("compression-level: %q is not a number", v)
		}
		o.compression.Level = &level
	case k == "source-date-epoch":
		o.epoch, err = parseEpoch(v)
		return err
	case strings.HasPrefix(k, "annotation"):
		return o.annotations.add(k, v)
	default:
		o.metadata[k] = []byte(v)
	}
	return nil
}

// levels are the least and greatest compression levels by type.
var levels = map[string][2]int{"uncompressed": {0, 0}, "gzip": {0, 9}, "zstd": {0, 22}}

func (o *imageOptions) check() error {
	c := o.compression
	bounds, ok := levels[c.Type]
	switch {
	case !ok:
		return fmt.Errorf("compression %q: this daemon has %s", c.Type, strings.Join(slices.Sorted(maps.Keys(levels)), ", "))
	case c.Level != nil && (*c.Level < bounds[0] || *c.Level > bounds[1]):
		return fmt.Errorf("compression-level %d: for %s it must be %d to %d", *c.Level, c.Type, bounds[0], bounds[1])
	case c.Type == "zstd" && !c.OCI:
		return errors.New("compression zstd needs oci-mediatypes=true: Docker's media types don't know it")
	}
	for _, n := range o.names {
		if n == "*" {
			continue
		}
		if _, err := normalName(n); err != nil {
			return err
		}
	}
	return nil
}

// normalName is name in full, with a tag.
func normalName(name string) (string, error) {
	parsed, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return "", fmt.Errorf("image name %q: %w", name, err)
	}
	return reference.TagNameOnly(parsed).String(), nil
}

// fullNames are the names of the image: those given, or the frontend's for "*".
func (o imageOptions) fullNames(metadata map[string][]byte) ([]string, error) {
	var out []string
	for _, n := range o.names {
		given := []string{n}
		if n == "*" {
			given = strings.Split(string(metadata["image.name"]), ",")
		}
		for _, g := range given {
			if g == "" {
				continue
			}
			full, err := normalName(g)
			if err != nil {
				return nil, err
			}
			out = append(out, full)
		}
	}
	return out, nil
}

// parseBool reads the forms that clients send; an empty value is true
// (EXP-030).
func parseBool(k, v string, dst *bool) error {
	if v == "" {
		*dst = true
		return nil
	}
	b, err := strconv.ParseBool(v)
	if err != nil {
		return fmt.Errorf("%s: %q is neither true nor false", k, v)
	}
	*dst = b
	return nil
}

// epoch is the time that results are clamped to. set tells an explicitly empty
// one, which is no clamping whatever the frontend says, from none.
type epoch struct {
	set  bool
	time *time.Time
}

func parseEpoch(v string) (epoch, error) {
	if v == "" {
		return epoch{set: true}, nil
	}
	secs, err := strconv.ParseInt(v, 10, 64)
	if err != nil {
		return epoch{}, fmt.Errorf("source-date-epoch: %q is not a number of seconds", v)
	}
	t := time.Unix(secs, 0).UTC()
	return epoch{set: true, time: &t}, nil
}

// or returns e if it is set, else what the frontend says for the platform.
func (e epoch) or(metadata map[string][]byte, platform string) (epoch, error) {
	if e.set {
		return e, nil
	}
	v, ok := platformValue(metadata, "source.date.epoch", platform)
	if !ok {
		return e, nil
	}
	return parseEpoch(string(v))
}

// created is when the result is said to be made.
func (e epoch) created(now time.Time) time.Time {
	if e.time != nil {
		return *e.time
	}
	return now
}

// platformValue returns the value of key for a platform: its own, or the one
// that is for all.
func platformValue(metadata map[string][]byte, key, platform string) ([]byte, bool) {
	if platform != "" {
		if v, ok := metadata[key+"/"+platform]; ok {
			return v, true
		}
	}
	v, ok := metadata[key]
	return v, ok
}
