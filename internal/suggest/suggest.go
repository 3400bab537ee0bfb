// Package suggest finds what a user may have meant by a word that isn't known.
package suggest

import (
	"fmt"
	"strings"

	"github.com/agext/levenshtein"
	"github.com/urfave/cli/v3"
)

// Nearest returns "; did you mean X?" for the known word nearest to given, ""
// if none is near.
func Nearest(given string, known []string) string {
	best, bestDist := "", len(given)/2+1
	for _, k := range known {
		if d := levenshtein.Distance(given, k, nil); d < bestDist {
			best, bestDist = k, d
		}
	}
	if best == "" {
		return ""
	}
	return "; did you mean " + best + "?"
}

// Flag adds the nearest flag of c to the error of an unknown one.
func Flag(err error, c *cli.Command) error {
	_, given, ok := strings.Cut(err.Error(), "flag provided but not defined: -")
	if !ok {
		return err
	}
	given = strings.TrimLeft(given, "-")
	var known []string
	for _, f := range c.Flags {
		known = append(known, f.Names()...)
	}
	near := Nearest(given, known)
	if near == "" {
		return fmt.Errorf("unknown flag --%s", given)
	}
	return fmt.Errorf("unknown flag --%s%s", given, strings.Replace(near, "mean ", "mean --", 1))
}
