package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/console"
	"github.com/kilnbuild/kiln/client"
	"github.com/kilnbuild/kiln/client/progress"
	control "github.com/moby/buildkit/api/services/control"
	"github.com/moby/buildkit/solver/pb"
	"github.com/opencontainers/go-digest"
	"github.com/tonistiigi/go-csvvalue"
	"github.com/urfave/cli/v3"
	"google.golang.org/protobuf/proto"
)

func buildCommand() *cli.Command {
	return &cli.Command{
		Name:      "build",
		Aliases:   []string{"b"},
		Usage:     "build a Dockerfile or a definition",
		ArgsUsage: "[PATH]",
		Description: "buildctl build [-t NAME] [-f FILE] [-o OUT] [--build-arg K=V] PATH builds the Dockerfile in PATH.\n" +
			"Without PATH, the flags say what is built, as with upstream's buildctl; without --frontend, a definition is read from stdin.",
		Flags:  slices.Concat(shortFlags(), buildFlags()),
		Action: runBuild,
		// Values such as outputs contain commas.
		DisableSliceFlagSeparator: true,
	}
}

// shortFlags belong to the form with PATH.
func shortFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringSliceFlag{Name: "tag", Aliases: []string{"t"}, Usage: "name of the image"},
		&cli.StringFlag{Name: "file", Aliases: []string{"f"}, Usage: "the Dockerfile (default: PATH/Dockerfile)"},
		&cli.StringSliceFlag{Name: "build-arg", Usage: "K=V, or K to take the value from the environment"},
		&cli.StringSliceFlag{Name: "build-context", Usage: "NAME=VALUE: a directory, docker-image://REF or oci-layout://NAME@DIGEST"},
		&cli.StringSliceFlag{Name: "label", Usage: "K=V"},
		&cli.StringFlag{Name: "target", Usage: "stage to build"},
		&cli.StringFlag{Name: "platform", Usage: "platforms, with commas"},
		&cli.BoolFlag{Name: "push", Usage: "push the image"},
	}
}

// buildFlags are upstream's.
func buildFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringSliceFlag{Name: "output", Aliases: []string{"o"}, Usage: "type=image|oci|docker|local|tar,...; with PATH also a directory, or - for a tar on stdout"},
		&cli.StringFlag{Name: "progress", Usage: "auto, plain, tty, quiet or rawjson", Value: "auto", Sources: cli.EnvVars("BUILDKIT_PROGRESS")},
		&cli.StringFlag{Name: "trace", Usage: "file for status messages as JSON lines"},
		&cli.StringSliceFlag{Name: "local", Usage: "NAME=DIR that the build may read"},
		&cli.StringSliceFlag{Name: "oci-layout", Usage: "NAME=DIR of an OCI layout that the build may read"},
		&cli.StringFlag{Name: "frontend", Usage: "frontend that makes the definition, such as dockerfile.v0"},
		&cli.StringSliceFlag{Name: "opt", Usage: "K=V for the frontend"},
		&cli.BoolFlag{Name: "no-cache", Usage: "run every step"},
		&cli.StringSliceFlag{Name: "secret", Usage: "id=ID[,src=FILE|,env=VAR]"},
		&cli.StringSliceFlag{Name: "ssh", Usage: "default|ID[=SOCKET|KEY[,KEY]][,raw=true]"},
		&cli.StringFlag{Name: "source-policy-file", Usage: "JSON file that says which sources the build may use"},
		&cli.StringSliceFlag{Name: "allow", Usage: "entitlement that the build may use, such as network.host"},
		&cli.StringFlag{Name: "metadata-file", Usage: "file for what the exporters say of the result"},
		&cli.StringFlag{Name: "ref-file", Usage: "file for the build's id"},
		&cli.StringFlag{Name: "on-error", Usage: "shell: open a shell in a step that fails; its input is stdin, on a terminal or not", Value: "fail"},
		&cli.StringSliceFlag{Name: "registry-auth-tlscontext", Usage: "host=H[,ca=F][,cert=F][,key=F][,insecure=BOOL]"},
		&cli.StringSliceFlag{Name: "export-cache", Usage: "type=registry,ref=REF|local,dest=DIR|inline[,mode=min|max][,...]"},
		&cli.StringSliceFlag{Name: "import-cache", Usage: "type=registry,ref=REF|local,src=DIR"},
	}
}

func runBuild(ctx context.Context, c *cli.Command) error {
	opts, err := solveOptions(c)
	if err != nil {
		return err
	}
	cl, err := connect(ctx, c)
	if err != nil {
		return err
	}
	defer cl.Close()
	if path := c.String("ref-file"); path != "" {
		if err := os.WriteFile(path, []byte(opts.Ref), 0o644); err != nil {
			return fmt.Errorf("write the build's id: %w", err)
		}
	}
	resp, err := solve(ctx, c, cl, opts)
	if err != nil {
		return err
	}
	if path := c.String("metadata-file"); path != "" {
		if err := writeMetadata(path, resp); err != nil {
			return err
		}
	}
	if len(opts.Exports) > 0 && !slices.ContainsFunc(opts.Exports, leaves) {
		fmt.Fprintln(os.Stderr, "the image is in the daemon's cache alone: --push sends it to its registry, -o type=docker,dest=FILE writes an archive")
	}
	return printResult(os.Stdout, resp)
}

// leaves says whether what is exported is anywhere but in the daemon's cache.
func leaves(ex client.Export) bool {
	push, set := ex.Attrs["push"] // an empty one is true
	yes, err := strconv.ParseBool(push)
	return ex.Type != "image" || set && (err != nil || yes)
}

// solve runs the build with its progress drawn on stderr.
func solve(ctx context.Context, c *cli.Command, cl *client.Client, opts client.SolveOptions) (client.Response, error) {
	failure, err := newOnError(c, opts)
	if err != nil {
		return nil, err
	}
	display, err := startDisplay(ctx, os.Stderr, c.String("progress"))
	if err != nil {
		return nil, err
	}
	run := cl.Solve
	if failure != nil {
		failure.quiet = display.end
		run = func(ctx context.Context, opts client.SolveOptions, show client.Status) (client.Response, error) {
			return cl.Build(ctx, opts, failure.drive, show)
		}
	}
	show := display.show
	if path := c.String("trace"); path != "" {
		f, err := os.Create(path)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("trace file: %w", err), display.end())
		}
		defer f.Close()
		enc := json.NewEncoder(f)
		var failed error
		show = func(msg *control.StatusResponse) {
			if failed == nil {
				failed = enc.Encode(progress.Message(msg))
			}
			display.show(msg)
		}
		resp, err := run(ctx, opts, show)
		return resp, errors.Join(err, display.end(), failed)
	}
	resp, err := run(ctx, opts, show)
	return resp, errors.Join(err, display.end())
}

// solveOptions reads the flags of both forms.
func solveOptions(c *cli.Command) (client.SolveOptions, error) {
	opts := client.SolveOptions{Ref: newRef(), Frontend: c.String("frontend"), Entitlements: c.StringSlice("allow")}
	var err error
	if opts.Attrs, err = pairs("opt", c.StringSlice("opt")); err != nil {
		return opts, err
	}
	if opts.Locals, err = pairs("local", c.StringSlice("local")); err != nil {
		return opts, err
	}
	if opts.OCILayouts, err = pairs("oci-layout", c.StringSlice("oci-layout")); err != nil {
		return opts, err
	}
	if opts.Attachables, err = attachables(c); err != nil {
		return opts, err
	}
	if opts.SourcePolicy, err = sourcePolicy(c.String("source-policy-file")); err != nil {
		return opts, err
	}
	var outputs []string
	switch c.Args().Len() {
	case 0:
		outputs, err = c.StringSlice("output"), longForm(c, &opts)
	case 1:
		outputs, err = shortForm(c, c.Args().First(), &opts)
	default:
		err = fmt.Errorf("one PATH can be built, not %d: %q", c.Args().Len(), c.Args().Slice())
	}
	if err != nil {
		return opts, err
	}
	if opts.CacheExports, err = caches("export-cache", c.StringSlice("export-cache")); err != nil {
		return opts, err
	}
	if opts.CacheImports, err = caches("import-cache", c.StringSlice("import-cache")); err != nil {
		return opts, err
	}
	opts.SharedKey = sharedKey(opts.Locals)
	for _, o := range outputs {
		fields, err := csvvalue.Fields(o, nil)
		if err != nil {
			return opts, fmt.Errorf("output %q: %w", o, err)
		}
		ex, err := client.ParseExport(fields, pipedStdout())
		if err != nil {
			return opts, err
		}
		opts.Exports = append(opts.Exports, ex)
	}
	return opts, nil
}

// longForm is upstream's: the flags say it all.
func longForm(c *cli.Command, opts *client.SolveOptions) error {
	for _, f := range shortFlags() {
		if name := f.Names()[0]; c.IsSet(name) {
			return fmt.Errorf("--%s goes with a PATH to build, such as: buildctl build --%s VALUE PATH", name, name)
		}
	}
	if c.Bool("no-cache") {
		opts.Attrs["no-cache"] = ""
	}
	if opts.Frontend != "" {
		return nil
	}
	if _, err := console.ConsoleFromFile(os.Stdin); err == nil {
		return errors.New("nothing to build: name a PATH, or a --frontend, or pipe a definition to stdin")
	}
	data, err := io.ReadAll(os.Stdin)
	if err != nil {
		return fmt.Errorf("read definition from stdin: %w", err)
	}
	if len(data) == 0 {
		return errors.New("read definition from stdin: it is empty")
	}
	def := &pb.Definition{}
	if err := proto.Unmarshal(data, def); err != nil {
		return fmt.Errorf("read definition from stdin: %w", err)
	}
	if c.Bool("no-cache") {
		ignoreCache(def)
	}
	opts.Definition, opts.Attrs = def, nil
	return nil
}

// caches reads the values of a flag; a bare one is a reference in a registry.
func caches(flag string, in []string) (out []client.Cache, err error) {
	for _, s := range in {
		if !strings.Contains(s, "=") {
			out = append(out, client.Cache{Type: "registry", Attrs: map[string]string{"ref": s}})
			continue
		}
		fields, err := csvvalue.Fields(s, nil)
		if err != nil {
			return nil, fmt.Errorf("%s %q: %w", flag, s, err)
		}
		c := client.Cache{Attrs: map[string]string{}}
		for _, f := range fields {
			k, v, ok := strings.Cut(f, "=")
			switch k = strings.ToLower(k); {
			case !ok:
				return nil, fmt.Errorf("%s %q: %q is not K=V", flag, s, f)
			case k == "type":
				c.Type = v
			default:
				c.Attrs[k] = v
			}
		}
		if c.Type == "" {
			return nil, fmt.Errorf("%s %q: type is missing, such as type=registry", flag, s)
		}
		out = append(out, c)
	}
	return out, nil
}

// ignoreCache makes every op run, also those that have no metadata yet.
func ignoreCache(def *pb.Definition) {
	if def.Metadata == nil {
		def.Metadata = map[string]*pb.OpMetadata{}
	}
	for _, op := range def.Def {
		dgst := digest.FromBytes(op).String()
		if def.Metadata[dgst] == nil {
			def.Metadata[dgst] = &pb.OpMetadata{}
		}
		def.Metadata[dgst].IgnoreCache = true
	}
}

func pairs(flag string, in []string) (map[string]string, error) {
	out := map[string]string{}
	for _, s := range in {
		k, v, ok := strings.Cut(s, "=")
		if !ok {
			return nil, fmt.Errorf("--%s %q: not of the form key=value", flag, s)
		}
		out[k] = v
	}
	return out, nil
}

// pipedStdout is stdout unless that is a terminal.
func pipedStdout() io.Writer {
	if _, err := console.ConsoleFromFile(os.Stdout); err == nil {
		return nil
	}
	return os.Stdout
}

// writeMetadata writes resp as JSON; values that are JSON in base64 become
// objects (BCL-034).
func writeMetadata(path string, resp client.Response) error {
	out := map[string]any{}
	for k, v := range resp {
		out[k] = v
		if raw, err := base64.StdEncoding.DecodeString(v); err == nil && json.Valid(raw) && strings.HasPrefix(string(raw), "{") {
			out[k] = json.RawMessage(raw)
		}
	}
	data, err := json.MarshalIndent(out, "", "  ")
	if err != nil {
		return fmt.Errorf("metadata: %w", err)
	}
	return os.WriteFile(path, data, 0o666)
}

// printResult shows what a subrequest such as lint answered (BCL-041).
func printResult(w io.Writer, resp client.Response) error {
	const prefix = "frontend.result."
	if txt, ok := resp[prefix+"txt"]; ok {
		_, err := fmt.Fprintln(w, strings.TrimSuffix(txt, "\n"))
		return err
	}
	for _, k := range slices.Sorted(maps.Keys(resp)) {
		if name, ok := strings.CutPrefix(k, prefix); ok {
			if _, err := fmt.Fprintf(w, "%s: %s\n", name, resp[k]); err != nil {
				return err
			}
		}
	}
	return nil
}
