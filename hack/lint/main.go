// Command lint checks what go vet can't: that packages import only from rows
// below their own, and that nothing imports more of upstream than the contract.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
)

const module = "github.com/kilnbuild/kiln/"

// rows is the picture of ARCHITECTURE.md: a package imports only from rows below
// its own. A package belongs to the entry with the longest matching prefix;
// packages of one entry may import each other.
var rows = [][]string{
	{"internal"},
	{"solver", "snapshot"},
	{"cache", "executor"},
	{"ops", "client/llb"},
	{"worker", "worker/export", "worker/remotecache", "worker/verify", "frontend", "client"},
	{"control", "control/build", "control/history", "control/explain", "control/monitor", "control/record"},
	{"cmd", "hack", "examples"},
}

// inner are the rows inside an entry, lowest first, for entries whose packages
// have an order of their own.
var inner = map[string][]string{
	"cache":    {"cache", "cache/cachetest", "cache/contenthash", "cache/keys", "cache/remote"},
	"ops":      {"ops/sessiontest", "ops/filetree/treetest", "ops/filetree", "ops", "ops/source/onefile", "ops/source/turns", "ops/source/registry", "ops/policy", "ops/source/image", "ops/source/ocilayout", "ops/source/local", "ops/source/git/gittest", "ops/source/git", "ops/source/http"},
	"frontend": {"frontend", "frontend/gateway", "frontend/dockerfile"},
	"control":  {"control/history", "control/explain", "control/record", "control/build", "control/monitor", "control"},
}

// allowed is what may be imported of upstream's module.
var allowed = regexp.MustCompile(`^github\.com/moby/buildkit/(api/|solver/pb$|solver/errdefs$|frontend/gateway/pb$|sourcepolicy/(pb|policysession)$|` +
	`util/(apicaps|grpcerrors|stack|progress/progressui)(/|$)|session(/|$)|client$|frontend/dockerfile/(parser|instructions|shell|command|linter)$|frontend/subrequests(/|$))`)

type pkg struct {
	ImportPath   string
	Imports      []string
	TestImports  []string
	XTestImports []string
}

func main() {
	problems, err := check()
	if err != nil {
		fmt.Fprintln(os.Stderr, "lint:", err)
		os.Exit(2)
	}
	for _, p := range problems {
		fmt.Println(p)
	}
	if len(problems) > 0 {
		os.Exit(1)
	}
}

// check lists what breaks the rules.
func check() ([]string, error) {
	pkgs, err := list()
	if err != nil {
		return nil, err
	}
	var problems []string
	for _, p := range pkgs {
		from := strings.TrimPrefix(p.ImportPath, module)
		if _, _, ok := place(from); !ok {
			problems = append(problems, fmt.Sprintf("%s stands in no row; add it to hack/lint and ARCHITECTURE.md", from))
			continue
		}
		for _, im := range p.Imports {
			if to, ours := strings.CutPrefix(im, module); ours && !below(from, to) {
				problems = append(problems, fmt.Sprintf("%s imports %s, which is not in a row below its own", from, to))
			}
		}
		for _, im := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
			if strings.HasPrefix(im, "github.com/moby/buildkit/") && !allowed.MatchString(im) {
				problems = append(problems, fmt.Sprintf("%s imports %s, which is not part of upstream's contract", from, im))
			}
		}
	}
	return problems, nil
}

func list() ([]pkg, error) {
	cmd := exec.Command("go", "list", "-tags", "e2e,vm,selinux", "-json=ImportPath,Imports,TestImports,XTestImports", module+"...")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	var pkgs []pkg
	dec := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs, nil
		} else if err != nil {
			return nil, fmt.Errorf("read go list's output: %w", err)
		}
		pkgs = append(pkgs, p)
	}
}

// place returns the row of path and the entry it belongs to.
func place(path string) (row int, entry string, ok bool) {
	for i, names := range rows {
		for _, name := range names {
			if within(path, name) && len(name) > len(entry) {
				row, entry, ok = i, name, true
			}
		}
	}
	return row, entry, ok
}

func within(path, name string) bool { return path == name || strings.HasPrefix(path, name+"/") }

// below reports whether from may import to.
func below(from, to string) bool {
	fromRow, fromEntry, _ := place(from)
	toRow, toEntry, ok := place(to)
	switch {
	case !ok:
		return false
	case fromRow != toRow:
		return toRow < fromRow
	}
	if order := innerOrder(from, to); order != nil {
		return innerRank(order, to) <= innerRank(order, from)
	}
	return fromEntry == toEntry
}

// innerOrder returns the inner rows that hold both packages.
func innerOrder(from, to string) []string {
	for name, order := range inner {
		if within(from, name) && within(to, name) {
			return order
		}
	}
	return nil
}

func innerRank(order []string, path string) int {
	best, rank := "", -1
	for i, name := range order {
		if within(path, name) && len(name) >= len(best) {
			best, rank = name, i
		}
	}
	return rank
}
