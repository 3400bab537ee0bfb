package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// fsck looks at the state directory that the daemon would use, whether a flag
// says so, before the command or after it, or the config file.
func TestCheckedRoot(t *testing.T) {
	dir := t.TempDir()
	conf := filepath.Join(dir, "c.toml")
	must(t, os.WriteFile(conf, fmt.Appendf(nil, "root = %q\n", filepath.Join(dir, "of-the-file")), 0o600))
	empty := filepath.Join(dir, "empty.toml")
	must(t, os.WriteFile(empty, nil, 0o600))
	flag := filepath.Join(dir, "of-the-flag")
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--config", conf, "fsck"}, "of-the-file"},
		{[]string{"--config", conf, "--root", flag, "fsck"}, "of-the-flag"},
		{[]string{"--config", empty, "fsck", "--root", flag, "--deep"}, "of-the-flag"},
		{[]string{"fsck", "--repair", "--config", conf}, "of-the-file"},
	} {
		cmd := command()
		cmd.Writer, cmd.ErrWriter = io.Discard, io.Discard
		err := cmd.Run(context.Background(), append([]string{"kilnd"}, c.args...))
		if err == nil || !strings.Contains(err.Error(), filepath.Join(dir, c.want)) {
			t.Errorf("kilnd %s: %v, want it to look at %s", strings.Join(c.args, " "), err, c.want)
		}
	}
}
