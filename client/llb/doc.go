// Package llb builds LLB definitions: the graphs of operations that a build
// daemon solves.
//
// A State is an immutable value: an output of some operation, or nothing
// (Scratch), together with the settings that the next command run on it gets
// (environment, working directory, user, ...). Sources (Image, Local, Git,
// HTTP, ...) begin a graph; Run, File, Merge and Diff grow it; Marshal writes
// it down as a pb.Definition.
//
//	st := llb.Image("busybox").
//		Run(llb.Shlex("sh -c 'echo hi > /out/hi'"), llb.Dir("/out")).
//		File(llb.Mkdir("/empty", 0o755))
//	def, err := st.Marshal()
//
// Marshalling is deterministic: the same calls give the same bytes, and so the
// same operation digests and cache keys, as other builders of LLB give. Every
// operation demands the capabilities that it uses, so that a daemon that lacks
// one refuses the definition instead of misreading it.
//
// The package does no I/O and holds no global state. States may be used from
// several goroutines at once; an ExecState may not while AddMount is called.
package llb
