package main

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/kilnbuild/kiln/client"
	"github.com/kilnbuild/kiln/client/llb"
	"github.com/urfave/cli/v3"
)

// shortForm turns `build -t NAME PATH` into what the Dockerfile frontend wants.
// It returns the outputs in the long form.
func shortForm(c *cli.Command, path string, opts *client.SolveOptions) (outputs []string, err error) {
	if opts.Frontend == "" {
		opts.Frontend = "dockerfile.v0"
	}
	if isRemote(path) {
		opts.Attrs["context"] = path
		if file := c.String("file"); file != "" {
			opts.Attrs["filename"] = file
		}
	} else if err := localContext(path, c.String("file"), opts); err != nil {
		return nil, err
	}
	for flag, attr := range map[string]string{"target": "target", "platform": "platform"} {
		if v := c.String(flag); v != "" {
			opts.Attrs[attr] = v
		}
	}
	if c.Bool("no-cache") {
		opts.Attrs["no-cache"] = ""
	}
	for _, arg := range c.StringSlice("build-arg") {
		k, v, ok := strings.Cut(arg, "=")
		if !ok {
			if v, ok = os.LookupEnv(k); !ok {
				continue // as with docker: an unset variable is not passed
			}
		}
		opts.Attrs["build-arg:"+k] = v
	}
	for _, l := range c.StringSlice("label") {
		k, v, _ := strings.Cut(l, "=")
		opts.Attrs["label:"+k] = v
	}
	if err := namedContexts(c.StringSlice("build-context"), opts); err != nil {
		return nil, err
	}
	return shortOutputs(c)
}

// isRemote tells whether the daemon fetches the context: a repository, or the URL
// of an archive or a Dockerfile.
func isRemote(path string) bool {
	repo, err := llb.ParseGitRepo(path)
	return err == nil && !repo.LooksLocal || strings.HasPrefix(path, "http://") || strings.HasPrefix(path, "https://")
}

// localContext serves the directory path, and that of the Dockerfile.
func localContext(path, file string, opts *client.SolveOptions) error {
	st, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("build context: %w", err)
	}
	if !st.IsDir() {
		return fmt.Errorf("build context %s is not a directory; name the Dockerfile with -f and its directory as PATH", path)
	}
	if file == "" {
		file = filepath.Join(path, "Dockerfile")
	} else if _, err := os.Stat(file); err != nil {
		return fmt.Errorf("look for Dockerfile: %w; -f is relative to the current directory", err)
	}
	opts.Locals["context"], opts.Locals["dockerfile"] = path, filepath.Dir(file)
	opts.Attrs["filename"] = filepath.Base(file)
	return nil
}

// namedContexts passes contexts on; a directory is served under its name.
func namedContexts(in []string, opts *client.SolveOptions) error {
	for _, s := range in {
		name, value, ok := strings.Cut(s, "=")
		if !ok {
			return fmt.Errorf("--build-context %q: not of the form NAME=VALUE", s)
		}
		if !strings.Contains(value, "://") {
			opts.Locals[name] = value
			value = "local:" + name
		}
		opts.Attrs["context:"+name] = value
	}
	return nil
}

// shortOutputs rewrites -t, --push and the short forms of -o.
func shortOutputs(c *cli.Command) (outputs []string, err error) {
	tags := c.StringSlice("tag")
	for _, o := range c.StringSlice("output") {
		switch {
		case o == "-":
			o = "type=tar"
		case !strings.Contains(o, "="):
			o = "type=local,dest=" + o
		}
		outputs = append(outputs, o)
	}
	if len(outputs) == 0 && (len(tags) > 0 || c.Bool("push")) {
		outputs = []string{"type=image"}
	}
	for i, o := range outputs {
		image := slices.ContainsFunc([]string{"type=image", "type=oci", "type=docker"}, func(t string) bool {
			return o == t || strings.HasPrefix(o, t+",") || strings.Contains(o, ","+t)
		})
		if image && len(tags) > 0 && !strings.Contains(o, "name=") {
			outputs[i] += `,"name=` + strings.Join(tags, ",") + `"`
		}
		if c.Bool("push") && strings.HasPrefix(o, "type=image") {
			outputs[i] += ",push=true"
		}
	}
	if c.Bool("push") && len(tags) == 0 && !strings.Contains(strings.Join(outputs, " "), "name=") {
		return nil, fmt.Errorf("--push needs a name: -t NAME")
	}
	return outputs, nil
}

// newRef is a build's id.
func newRef() string { return strings.ToLower(rand.Text()) }

// sharedKey identifies these directories on this machine, for this user: a
// later build of them sends only what changed, and is compared with this one.
func sharedKey(locals map[string]string) string {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown" // any constant does: the key only has to be stable
	}
	h := sha256.New()
	fmt.Fprintf(h, "%s\x00%d", host, os.Getuid())
	for _, name := range slices.Sorted(maps.Keys(locals)) {
		dir, err := filepath.Abs(locals[name])
		if err != nil {
			dir = locals[name]
		}
		fmt.Fprintf(h, "\x00%s=%s", name, dir)
	}
	return hex.EncodeToString(h.Sum(nil))
}
