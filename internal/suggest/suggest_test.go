package suggest

import (
	"errors"
	"testing"

	"github.com/urfave/cli/v3"
)

func TestNearest(t *testing.T) {
	known := []string{"addr", "config", "oci-worker-binary"}
	for given, want := range map[string]string{
		"adr":               "; did you mean addr?",
		"oci-worker-binry":  "; did you mean oci-worker-binary?",
		"something-else-42": "",
	} {
		if got := Nearest(given, known); got != want {
			t.Errorf("Nearest(%q) = %q, want %q", given, got, want)
		}
	}
}

func TestFlag(t *testing.T) {
	c := &cli.Command{Flags: []cli.Flag{&cli.StringFlag{Name: "addr", Aliases: []string{"a"}}}}
	if got := Flag(errors.New("flag provided but not defined: -adr"), c).Error(); got != "unknown flag --adr; did you mean --addr?" {
		t.Errorf("Flag = %q", got)
	}
	if other := errors.New("other"); Flag(other, c) != other {
		t.Error("an error of another kind was changed")
	}
}
