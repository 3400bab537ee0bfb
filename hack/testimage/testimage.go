// Package testimage makes small images for demos, tests and benchmarks out of
// what Debian's packages install, as OCI layouts, and pushes them to registries
// on loopback.
package testimage

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// File is an entry of a layer. Mode's type bits are those of tar: a name that
// ends with "/" is a directory, one with a Link a symlink.
type File struct {
	Name     string
	Mode     int64
	UID, GID int
	Link     string
	HardLink string
	Xattrs   map[string]string
	Data     []byte
}

// Image is what Write makes a layout of.
type Image struct {
	Tar    string // path of an uncompressed tar that is the first layer; may be ""
	Layers [][]File
	Config ocispec.ImageConfig
}

// stamp is the time of everything in the images, so that they are the same
// bytes wherever they are made.
var stamp = time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)

// Busybox is a base image with busybox-static, its applets, and the usual files
// in /etc.
func Busybox() (Image, error) {
	const busybox = "/bin/busybox"
	bin, err := os.ReadFile(busybox)
	if err != nil {
		return Image{}, fmt.Errorf("%w: install the package busybox-static", err)
	}
	list, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return Image{}, fmt.Errorf("%s --list: %w", busybox, err)
	}
	files := []File{
		{Name: "bin/", Mode: 0o755}, {Name: "bin/busybox", Mode: 0o755, Data: bin},
		{Name: "etc/", Mode: 0o755},
		{Name: "etc/passwd", Mode: 0o644, Data: []byte("root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n")},
		{Name: "etc/group", Mode: 0o644, Data: []byte("root:x:0:\ndaemon:x:1:\nwheel:x:10:root,daemon\nnobody:x:65534:\n")},
		{Name: "home/", Mode: 0o755}, {Name: "root/", Mode: 0o700}, {Name: "tmp/", Mode: 0o1777},
		{Name: "usr/", Mode: 0o755}, {Name: "usr/bin/", Mode: 0o755}, {Name: "usr/sbin/", Mode: 0o755},
		{Name: "var/", Mode: 0o755}, {Name: "var/tmp/", Mode: 0o1777},
	}
	for _, applet := range strings.Fields(string(list)) {
		if applet != "busybox" {
			files = append(files, File{Name: "bin/" + applet, Mode: 0o777, Link: "busybox"})
		}
	}
	files = append(files, File{Name: "usr/bin/env", Mode: 0o777, Link: "../../bin/busybox"})
	return Image{
		Layers: [][]File{files},
		Config: ocispec.ImageConfig{
			Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
			Cmd: []string{"sh"},
		},
	}, nil
}

// Layout is an image as it was written.
type Layout struct {
	Dir      string
	Manifest ocispec.Descriptor
	Blobs    []ocispec.Descriptor // config and layers
}

// Write makes an OCI layout of img in dir, tagged latest.
func (img Image) Write(dir string) (Layout, error) {
	l := Layout{Dir: dir}
	config := ocispec.Image{
		Created:  &stamp,
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		Config:   img.Config,
		RootFS:   ocispec.RootFS{Type: "layers"},
	}
	manifest := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	add := func(data []byte, diffID digest.Digest, err error) error {
		if err != nil {
			return err
		}
		desc, err := l.put(ocispec.MediaTypeImageLayerGzip, data)
		if err != nil {
			return err
		}
		manifest.Layers = append(manifest.Layers, desc)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, diffID)
		config.History = append(config.History, ocispec.History{Created: &stamp, CreatedBy: "testimage"})
		return nil
	}
	if img.Tar != "" {
		if err := add(compressFile(img.Tar)); err != nil {
			return l, err
		}
	}
	for _, files := range img.Layers {
		if err := add(layerOf(files)); err != nil {
			return l, err
		}
	}
	var err error
	if manifest.Config, err = l.putJSON(ocispec.MediaTypeImageConfig, config); err != nil {
		return l, err
	}
	l.Blobs = append([]ocispec.Descriptor{manifest.Config}, manifest.Layers...)
	if l.Manifest, err = l.putJSON(ocispec.MediaTypeImageManifest, manifest); err != nil {
		return l, err
	}
	tagged := l.Manifest
	tagged.Annotations = map[string]string{ocispec.AnnotationRefName: "latest"}
	index, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{tagged},
	})
	if err != nil {
		return l, err
	}
	if err := os.WriteFile(filepath.Join(dir, ocispec.ImageIndexFile), index, 0o644); err != nil {
		return l, err
	}
	return l, os.WriteFile(filepath.Join(dir, ocispec.ImageLayoutFile), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644)
}

func (l *Layout) putJSON(mediaType string, v any) (ocispec.Descriptor, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return l.put(mediaType, data)
}

func (l *Layout) put(mediaType string, data []byte) (ocispec.Descriptor, error) {
	dgst := digest.FromBytes(data)
	path := l.path(dgst)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return ocispec.Descriptor{}, err
	}
	return ocispec.Descriptor{MediaType: mediaType, Digest: dgst, Size: int64(len(data))}, os.WriteFile(path, data, 0o644)
}

func (l *Layout) path(dgst digest.Digest) string {
	return filepath.Join(l.Dir, ocispec.ImageBlobsDir, dgst.Algorithm().String(), dgst.Encoded())
}

func layerOf(files []File) (data []byte, diffID digest.Digest, err error) {
	var buf bytes.Buffer
	zw := gzip.NewWriter(&buf)
	diff := digest.Canonical.Digester()
	tw := tar.NewWriter(io.MultiWriter(zw, diff.Hash()))
	for _, f := range files {
		h := &tar.Header{
			Name: f.Name, Mode: f.Mode, Uid: f.UID, Gid: f.GID, Size: int64(len(f.Data)), ModTime: stamp, Format: tar.FormatPAX,
			Typeflag: tar.TypeReg,
		}
		for k, v := range f.Xattrs {
			if h.PAXRecords == nil {
				h.PAXRecords = map[string]string{}
			}
			h.PAXRecords["SCHILY.xattr."+k] = v
		}
		switch {
		case strings.HasSuffix(f.Name, "/"):
			h.Typeflag = tar.TypeDir
		case f.Link != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, f.Link
		case f.HardLink != "":
			h.Typeflag, h.Linkname = tar.TypeLink, f.HardLink
		}
		if err := tw.WriteHeader(h); err != nil {
			return nil, "", fmt.Errorf("layer entry %s: %w", f.Name, err)
		}
		if _, err := tw.Write(f.Data); err != nil {
			return nil, "", fmt.Errorf("layer entry %s: %w", f.Name, err)
		}
	}
	if err := tw.Close(); err != nil {
		return nil, "", err
	}
	if err := zw.Close(); err != nil {
		return nil, "", err
	}
	return buf.Bytes(), diff.Digest(), nil
}

// compressFile makes the tar at path a layer.
func compressFile(path string) (data []byte, diffID digest.Digest, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, "", err
	}
	defer f.Close()
	var buf bytes.Buffer
	zw, err := gzip.NewWriterLevel(&buf, gzip.BestSpeed)
	if err != nil {
		return nil, "", err
	}
	diff := digest.Canonical.Digester()
	if _, err := io.Copy(io.MultiWriter(zw, diff.Hash()), f); err != nil {
		return nil, "", err
	}
	if err := zw.Close(); err != nil {
		return nil, "", err
	}
	return buf.Bytes(), diff.Digest(), nil
}

// Push uploads the image to a registry on loopback that speaks plain HTTP, as
// name:tag.
func (l Layout) Push(host, name, tag string) error {
	for _, b := range l.Blobs {
		if err := l.pushBlob(host, name, b); err != nil {
			return fmt.Errorf("push %s of %s: %w", b.Digest, name, err)
		}
	}
	data, err := os.ReadFile(l.path(l.Manifest.Digest))
	if err != nil {
		return err
	}
	return send(http.MethodPut, fmt.Sprintf("http://%s/v2/%s/manifests/%s", host, name, tag), l.Manifest.MediaType, data, http.StatusCreated)
}

func (l Layout) pushBlob(host, name string, desc ocispec.Descriptor) error {
	data, err := os.ReadFile(l.path(desc.Digest))
	if err != nil {
		return err
	}
	resp, err := http.Post(fmt.Sprintf("http://%s/v2/%s/blobs/uploads/", host, name), "", nil)
	if err != nil {
		return err
	}
	resp.Body.Close()
	loc, err := resp.Location()
	if err != nil {
		return fmt.Errorf("start of upload: %s: %w", resp.Status, err)
	}
	q := loc.Query()
	q.Set("digest", desc.Digest.String())
	loc.RawQuery = q.Encode()
	return send(http.MethodPut, loc.String(), "application/octet-stream", data, http.StatusCreated)
}

func send(method, url, contentType string, data []byte, want int) error {
	req, err := http.NewRequest(method, url, bytes.NewReader(data))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", contentType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != want {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 1024))
		return fmt.Errorf("%s %s: %s: %s", method, url, resp.Status, body)
	}
	return nil
}
