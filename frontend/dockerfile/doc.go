// Package dockerfile is the built-in Dockerfile frontend: it turns a Dockerfile
// and its build contexts into LLB and image configs.
//
// A request goes this way:
//
//   - request.go reads the attributes into a config; contexts.go finds out what
//     the build context is; source.go reads the Dockerfile and ignore file.
//   - syntax.go hands the request on if the Dockerfile asks for another frontend;
//     subrequest.go answers questions about the Dockerfile.
//   - For each platform, conversion.go runs the steps: parse, global args
//     (args.go), stages and what they depend on (stages.go), base images
//     (base.go), then the instructions of every stage that the target needs
//     (dispatch.go, and one file per family of instructions).
//   - result.go puts the platforms together.
//
// Nothing is built here: what the frontend returns are lazy references. The only
// things it makes the daemon fetch are the Dockerfile, ignore files, downloads
// that may be an archive of the context, and the configs of base images that the
// target needs.
//
// Parsing, word expansion and the lint rules are imported; which operations and
// config an instruction makes, and how they are named, is decided here, equal to
// the reference frontend's op for op (testdata/README.md).
package dockerfile
