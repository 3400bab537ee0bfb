package dockerfile

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// image is an image config as Docker extends it.
type image dockerspec.DockerOCIImage

const (
	historyComment = "buildkit.dockerfile.v0"
	defaultPath    = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)

func parseImage(config []byte) (*image, error) {
	var img image
	if err := json.Unmarshal(config, &img); err != nil {
		return nil, fmt.Errorf("parse image config: %w", err)
	}
	return &img, nil
}

// emptyImage is the config that a stage from scratch starts with.
func emptyImage(p ocispec.Platform) image {
	var img image
	img.Platform = p
	img.OSFeatures = slices.Clone(p.OSFeatures)
	img.RootFS.Type = "layers"
	img.Config.WorkingDir = "/"
	img.setDefaultPath(p.OS)
	return img
}

// setDefaultPath gives the image a PATH unless it has one. Windows has its own.
func (img *image) setDefaultPath(os string) {
	if os == "windows" {
		return
	}
	for _, kv := range img.Config.Env {
		if k, _, _ := strings.Cut(kv, "="); k == "PATH" {
			return
		}
	}
	img.Config.Env = append(img.Config.Env, "PATH="+defaultPath)
}

// clone returns a copy that may be changed.
func (img image) clone() image {
	c := &img.Config
	c.Env = slices.Clone(c.Env)
	c.Cmd = slices.Clone(c.Cmd)
	c.Entrypoint = slices.Clone(c.Entrypoint)
	c.OnBuild = slices.Clone(c.OnBuild)
	c.Shell = slices.Clone(c.Shell)
	c.ExposedPorts = maps.Clone(c.ExposedPorts)
	c.Volumes = maps.Clone(c.Volumes)
	c.Labels = maps.Clone(c.Labels)
	if c.Healthcheck != nil {
		h := *c.Healthcheck
		h.Test = slices.Clone(h.Test)
		c.Healthcheck = &h
	}
	img.History = slices.Clone(img.History)
	return img
}

// setEnv sets a variable where it stands, or at the end.
func (img *image) setEnv(key, value string) {
	for i, kv := range img.Config.Env {
		if k, _, _ := strings.Cut(kv, "="); k == key {
			img.Config.Env[i] = key + "=" + value
			return
		}
	}
	img.Config.Env = append(img.Config.Env, key+"="+value)
}

// addHistory notes an instruction. Without layer, it changed only the config.
func (img *image) addHistory(createdBy string, layer bool, created *time.Time) {
	img.History = append(img.History, ocispec.History{
		CreatedBy:  createdBy,
		Comment:    historyComment,
		EmptyLayer: !layer,
		Created:    created,
	})
}

// withShell is a command in shell form as the shell gets it.
func (img *image) withShell(args []string) []string {
	shell := slices.Clone(img.Config.Shell)
	if len(shell) == 0 {
		shell = []string{"/bin/sh", "-c"}
		if img.OS == "windows" {
			shell = []string{"cmd", "/S", "/C"}
		}
	}
	return append(shell, strings.Join(args, " "))
}

// hasLayers reports whether there is more than a config. Images in the oldest
// format list no layers but tell of them in their history.
func (img *image) hasLayers() bool {
	if len(img.RootFS.DiffIDs) > 0 {
		return true
	}
	return slices.ContainsFunc(img.History, func(h ocispec.History) bool { return !h.EmptyLayer })
}
