// Command compat prints which rows of the compatibility tables are proven by
// tests, per table and in total. A test proves a row by carrying the comment
// "compat: ID"; "compat: ID no: reason" says that a row is not supported on
// purpose.
package main

import (
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

var (
	rowPattern  = regexp.MustCompile(`^\| (?:\[.\] )?(?:\[.\] \| )?([A-Z]+-[A-Z]?[0-9]+) \|`)
	markPattern = regexp.MustCompile(`compat: ([A-Z]+-[A-Z]?[0-9]+(?:, [A-Z]+-[A-Z]?[0-9]+)*)( no: .*)?`)
)

func main() {
	tables := flag.String("tables", "../shared/compat", "directory of the compatibility tables (*.md)")
	verbose := flag.Bool("v", false, "list every row")
	flag.Parse()
	if err := run(*tables, *verbose); err != nil {
		fmt.Fprintln(os.Stderr, "compat:", err)
		os.Exit(1)
	}
}

func run(tables string, verbose bool) error {
	rows, order, err := readTables(tables)
	if err != nil {
		return err
	}
	proven, refused, err := readMarks(".")
	if err != nil {
		return err
	}
	total, totalProven := 0, 0
	for _, table := range order {
		ids := rows[table]
		n := 0
		for _, id := range ids {
			where, ok := proven[id]
			if ok {
				n++
			}
			if verbose {
				fmt.Printf("  %-8s %s\n", id, strings.Join(append(where, refused[id]...), " "))
			}
			delete(proven, id)
			delete(refused, id)
		}
		fmt.Printf("%-18s %3d of %3d rows proven\n", table, n, len(ids))
		total, totalProven = total+len(ids), totalProven+n
	}
	fmt.Printf("%-18s %3d of %3d rows proven\n", "total", totalProven, total)
	unknown := slices.Sorted(maps.Keys(proven))
	for _, id := range unknown {
		fmt.Printf("unknown row %s in %s\n", id, strings.Join(proven[id], " "))
	}
	if len(unknown) > 0 {
		return fmt.Errorf("%d ids that tests claim to prove are in no table", len(unknown))
	}
	return nil
}

// readTables returns the ids of each table, in order.
func readTables(dir string) (rows map[string][]string, order []string, err error) {
	paths, err := filepath.Glob(filepath.Join(dir, "*.md"))
	if err != nil {
		return nil, nil, err
	}
	rows = map[string][]string{}
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, nil, err
		}
		table := filepath.Base(path)
		for line := range strings.Lines(string(data)) {
			if m := rowPattern.FindStringSubmatch(line); m != nil {
				rows[table] = append(rows[table], m[1])
			}
		}
		if len(rows[table]) > 0 {
			order = append(order, table)
		}
	}
	if len(order) == 0 {
		return nil, nil, fmt.Errorf("no tables in %s; say where they are with -tables", dir)
	}
	return rows, order, nil
}

// readMarks returns, by id, the files that prove it and those that refuse it.
func readMarks(dir string) (proven, refused map[string][]string, err error) {
	proven, refused = map[string][]string{}, map[string][]string{}
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "bin" || d.Name() == ".git"):
			return filepath.SkipDir
		case !strings.HasSuffix(path, ".go") || within(path, "hack/compat"):
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, m := range markPattern.FindAllStringSubmatch(string(data), -1) {
			into := proven
			if m[2] != "" {
				into = refused
			} else if !strings.HasSuffix(path, "_test.go") {
				continue
			}
			for _, id := range strings.Split(m[1], ", ") {
				if !slices.Contains(into[id], path) {
					into[id] = append(into[id], path)
				}
			}
		}
		return nil
	})
	return proven, refused, err
}

func within(path, dir string) bool { return strings.HasPrefix(path, dir+string(filepath.Separator)) }
