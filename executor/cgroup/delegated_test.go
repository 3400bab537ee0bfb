package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestDelegatedDir(t *testing.T) {
	mount := t.TempDir()
	group := func(path, procs string) {
		t.Helper()
		dir := filepath.Join(mount, path)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, content := range map[string]string{"cgroup.procs": procs, "cgroup.subtree_control": ""} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	group("alone", "42\n")
	group("shared", "41\n42\n")
	group("again", "")
	group("again/init", "42\n")
	if err := os.MkdirAll(filepath.Join(mount, "bare", "init"), 0o755); err != nil {
		t.Fatal(err)
	}
	for own, want := range map[string]string{
		"0::/alone\n":                     filepath.Join(mount, "alone"),
		"1:name=systemd:/\n0::/alone\n":   filepath.Join(mount, "alone"),
		"0::/shared\n":                    "", // others would have to be moved
		"0::/again/init\n":                filepath.Join(mount, "again"),
		"0::/bare\n":                      "", // no files that could be written
		"0::/bare/init\n":                 "",
		"0::/missing\n":                   "",
		"1:memory:/alone\n":               "", // no version 2
		"":                                "",
		"0::/alone (deleted)\nnonsense\n": "",
	} {
		if got, err := delegatedDir(mount, own, 42); got != want || err != nil {
			t.Errorf("%q: %q, %v", own, got, err)
		}
	}
}

func TestMissingController(t *testing.T) {
	err := setting{t.TempDir(), "memory.max", "5"}.write()
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "has no controller memory") {
		t.Errorf("%v", err)
	}
}

// What the whole machine lacks, nobody can pass on.
func TestControllerMissingEverywhere(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "a", "b")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	put := func(file, text string) {
		if err := os.WriteFile(filepath.Join(root, file), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	fails := func(want string) {
		t.Helper()
		err := setting{dir, "cpuset.cpus", "0"}.write()
		if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q in it", err, want)
		}
	}
	for _, group := range []string{"a", "a/b", "."} {
		put(filepath.Join(group, "cgroup.controllers"), "")
	}
	const forAll, forThis = "cgroup version 2 has no controller cpuset on this machine", "the cgroup has no controller cpuset"
	put("cgroup.controllers", "cpu memory\n")
	fails(forAll)
	put("cgroup.controllers", "cpu cpuset memory\n")
	fails(forThis)
	// The root of a cgroup namespace isn't the machine's.
	put("cgroup.type", "domain\n")
	put("cgroup.controllers", "cpu memory\n")
	fails(forThis)
}

// Where there are no groups, processes run in none: nothing is limited, counted
// or killed by them.
func TestNoGroups(t *testing.T) {
	m, err := New(Config{Tree: &Tree{Unprivileged: true}, Parent: "/kiln", Prefix: "p", Log: slog.New(slog.NewTextHandler(log{t}, nil))}, []string{"/other"})
	if err != nil {
		t.Fatal(err)
	}
	if m.HasGroups() || m.IsV2() {
		t.Error("there are groups")
	}
	for i := range 2 * ahead { // those made ahead and others
		g, err := m.Take(context.Background(), Spec{ID: fmt.Sprint(i), Parent: []string{"", "/other"}[i%2]})
		if err != nil {
			t.Fatal(err)
		}
		if len(g.JoinFDs()) > 0 || g.CloneFD() >= 0 || len(g.Mounts()) > 0 || len(g.Dirs()) > 0 {
			t.Errorf("group %d: %+v", i, g)
		}
		if u, err := g.Usage(); u != (Usage{}) || err != nil {
			t.Errorf("%+v %v", u, err)
		}
		if err := g.Kill(); err != nil {
			t.Error(err)
		}
		g.Release()
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}
