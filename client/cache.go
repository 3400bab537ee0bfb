package client

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/containerd/v2/core/content"
	contentlocal "github.com/containerd/containerd/v2/plugins/content/local"
	control "github.com/moby/buildkit/api/services/control"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Cache is build cache that is kept elsewhere. Of the type local, src and dest
// are directories of the client, in which an index names caches by their tag.
type Cache struct {
	Type  string
	Attrs map[string]string
}

const (
	localCache = "local"
	latest     = "latest"
)

func tagOf(attrs map[string]string) string {
	if t := attrs["tag"]; t != "" {
		return t
	}
	return latest
}

// resolveImports adds to imports of directories what their indexes say. A cache that
// isn't there yet is left out: it is how the first build with it begins.
func (o *SolveOptions) resolveImports() error {
	var out []Cache
	for _, c := range o.CacheImports {
		if c.Type == localCache && c.Attrs["digest"] == "" {
			index, err := readIndex(c.Attrs["src"])
			if err != nil {
				return fmt.Errorf("import cache from %s: %w", c.Attrs["src"], err)
			}
			i := slices.IndexFunc(index.Manifests, func(d ocispec.Descriptor) bool { return d.Annotations[ocispec.AnnotationRefName] == tagOf(c.Attrs) })
			if i < 0 {
				continue
			}
			c.Attrs = maps.Clone(c.Attrs)
			c.Attrs["digest"] = index.Manifests[i].Digest.String()
		}
		out = append(out, c)
	}
	o.CacheImports = out
	return nil
}

// cacheStores are the directories that caches are read from and written to.
func (o *SolveOptions) cacheStores(add func(name string, s content.Store)) error {
	for _, c := range slices.Concat(o.CacheImports, o.CacheExports) {
		dir := c.Attrs["src"] + c.Attrs["dest"]
		if c.Type != localCache || dir == "" {
			continue // the daemon says what is missing
		}
		store, err := contentlocal.NewStore(dir)
		if err != nil {
			return fmt.Errorf("cache in %s: %w", dir, err)
		}
		add("local:"+dir, store)
	}
	return nil
}

// cacheOptions are the caches as the daemon is told of them.
func (o *SolveOptions) cacheOptions() *control.CacheOptions {
	entries := func(list []Cache) (out []*control.CacheOptionsEntry) {
		for _, c := range list {
			out = append(out, &control.CacheOptionsEntry{Type: c.Type, Attrs: c.Attrs})
		}
		return out
	}
	return &control.CacheOptions{Imports: entries(o.CacheImports), Exports: entries(o.CacheExports)}
}

// tagCaches names in their indexes the caches that a build has written.
func (o *SolveOptions) tagCaches(resp Response) error {
	var desc ocispec.Descriptor
	if data := resp["cache.manifest"]; data == "" {
		return nil
	} else if err := json.Unmarshal([]byte(data), &desc); err != nil {
		return fmt.Errorf("what the daemon says of the exported cache: %w", err)
	}
	for _, c := range o.CacheExports {
		if c.Type != localCache {
			continue
		}
		if err := tagCache(c.Attrs["dest"], tagOf(c.Attrs), desc); err != nil {
			return fmt.Errorf("name the cache in %s: %w", c.Attrs["dest"], err)
		}
	}
	return nil
}

func tagCache(dir, tag string, desc ocispec.Descriptor) error {
	if _, err := os.Stat(filepath.Join(dir, ocispec.ImageBlobsDir, digest.SHA256.String(), desc.Digest.Encoded())); err != nil {
		return err // another cache of the same build
	}
	index, err := readIndex(dir)
	if err != nil {
		return err
	}
	index.Manifests = slices.DeleteFunc(index.Manifests, func(d ocispec.Descriptor) bool { return d.Annotations[ocispec.AnnotationRefName] == tag })
	desc.Annotations = map[string]string{ocispec.AnnotationRefName: tag}
	index.Manifests = append(index.Manifests, desc)
	for name, v := range map[string]any{ocispec.ImageIndexFile: index, ocispec.ImageLayoutFile: ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion}} {
		data, err := json.Marshal(v)
		if err != nil {
			return err
		}
		// In two steps: who reads it finds the old one or the new one.
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path+".new", data, 0o644); err != nil {
			return err
		}
		if err := os.Rename(path+".new", path); err != nil {
			return err
		}
	}
	return nil
}

// readIndex returns an empty index if there is none.
func readIndex(dir string) (index ocispec.Index, err error) {
	index = ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	data, err := os.ReadFile(filepath.Join(dir, ocispec.ImageIndexFile))
	if errors.Is(err, fs.ErrNotExist) {
		return index, nil
	}
	if err != nil {
		return index, err
	}
	return index, json.Unmarshal(data, &index)
}
