package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/kilnbuild/kiln/client/llb"
)

// graph is an LLB definition with the file that proves that it was built.
type graph struct {
	state   llb.State
	file    string
	content string
}

// wide is n files made side by side and brought together by one op.
func wide(n int) graph {
	var all *llb.FileAction
	for i := range n {
		name := fmt.Sprintf("/f%d", i)
		one := llb.Scratch().File(llb.Mkfile(name, 0o644, []byte(name)))
		if all == nil {
			all = llb.Copy(one, name, "/")
		} else {
			all = all.Copy(one, name, "/")
		}
	}
	last := fmt.Sprintf("f%d", n-1)
	return graph{llb.Scratch().File(all), last, "/" + last}
}

// chain is n files made one on top of the other.
func chain(n int) graph {
	st := llb.Scratch()
	for i := range n {
		st = st.File(llb.Mkfile(fmt.Sprintf("/f%d", i), 0o644, []byte(fmt.Sprint(i))))
	}
	return graph{st, "f0", "0"}
}

// merge is n states of one file each, merged.
func merge(n int) graph {
	layers := make([]llb.State, n)
	for i := range layers {
		layers[i] = llb.Scratch().File(llb.Mkfile(fmt.Sprintf("/f%d", i), 0o644, []byte(fmt.Sprint(i))))
	}
	return graph{llb.Merge(layers), "f0", "0"}
}

// definition builds g, once before if cached.
func definition(name string, cached bool, g graph) scenario {
	return scenario{
		name: name,
		prepare: func(dir, _ string) error {
			def, err := g.state.Marshal()
			if err != nil {
				return err
			}
			var data bytes.Buffer
			if err := llb.WriteTo(def, &data); err != nil {
				return err
			}
			return writeFile(filepath.Join(dir, "def"), data.String())
		},
		warm: func(r *runner) error {
			if !cached {
				return nil
			}
			return r.buildDefinition()
		},
		run:   func(r *runner) error { return r.buildDefinition() },
		check: func(r *runner) error { return r.expectDefinition(g) },
	}
}

// storedRecords is about what the store holds in the scenarios that begin with
// many records.
const storedRecords = 5000

// stored times run on a daemon with many records, after first; check is told how
// many are left.
func stored(name string, first, run func(*runner) error, check func(records int) error) scenario {
	s := definition(name, true, wide(storedRecords))
	build := s.warm
	s.warm = func(r *runner) error {
		if err := build(r); err != nil {
			return err
		}
		return first(r)
	}
	s.run = run
	s.check = func(r *runner) error {
		out, err := r.output(nil, "du", "--format", "{{range .}}{{println .ID}}{{end}}")
		if err != nil {
			return err
		}
		return check(len(strings.Fields(out)))
	}
	return s
}

func nothing(*runner) error { return nil }

func rest(*runner) error {
	<-time.After(calmDown)
	return nil
}

func du(r *runner) error { return r.buildctl("du") }

// workers asks for next to nothing: what counts is what the daemon has in memory.
func workers(r *runner) error { return r.buildctl("debug", "workers") }

const (
	// calmDown is how long a daemon may be busy with the end of a build: the
	// collector's pause is the longest.
	calmDown = 15 * time.Second
	idleFor  = 10 * time.Second
)

// idle counts what wakes up in a daemon that has built and does nothing.
func idle(name string) scenario {
	s := definition(name, true, chain(20))
	build := s.warm
	s.warm = func(r *runner) error {
		if err := build(r); err != nil {
			return err
		}
		return rest(r)
	}
	s.run = func(*runner) error {
		<-time.After(idleFor)
		return nil
	}
	s.idle = true
	return s
}

func stop(r *runner) error  { return r.d.stop() }
func start(r *runner) error { return r.d.start() }

func restart(r *runner) error {
	if err := stop(r); err != nil {
		return err
	}
	return start(r)
}

func allKept(records int) error {
	if records < storedRecords {
		return fmt.Errorf("%d records, want %d and more", records, storedRecords)
	}
	return nil
}

func allGone(records int) error {
	if records > 0 {
		return fmt.Errorf("%d records are left", records)
	}
	return nil
}

// buildDefinition builds the scenario's definition.
func (r *runner) buildDefinition(args ...string) error {
	f, err := os.Open(filepath.Join(r.input, "def"))
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = r.output(f, append([]string{"build"}, args...)...)
	return err
}

// expectDefinition builds the definition with its files to the client and looks
// at the one that proves it.
func (r *runner) expectDefinition(g graph) error {
	archive := r.out + ".tar"
	if err := r.buildDefinition("--output", "type=tar,dest="+archive); err != nil {
		return err
	}
	return expectInTar(archive, g.file, g.content)
}

// expectInTar compares a file in an archive.
func expectInTar(archive, file, want string) error {
	f, err := os.Open(archive)
	if err != nil {
		return err
	}
	defer f.Close()
	tr := tar.NewReader(f)
	for {
		h, err := tr.Next()
		if err != nil {
			return fmt.Errorf("%s in the result: %w", file, err)
		}
		if h.Name != file {
			continue
		}
		got, err := io.ReadAll(tr)
		if err != nil {
			return err
		}
		if string(got) != want {
			return fmt.Errorf("%s is %q, want %q", file, got, want)
		}
		return nil
	}
}
