package git

import (
	"context"
	"fmt"
	"strings"
)

// oldest is the git that reads its configuration from the environment, without
// which nothing in this package is safe.
var oldest = [2]int{2, 31}

// checkGit refuses a git that is too old, once.
func (s *Source) checkGit(ctx context.Context) error {
	if s.usable.Load() {
		return nil
	}
	out, err := command{args: []string{"version"}}.run(ctx)
	if err != nil {
		return err
	}
	if err := checkVersion(strings.TrimSpace(string(out))); err != nil {
		return err
	}
	s.usable.Store(true)
	return nil
}

func checkVersion(said string) error {
	var v [2]int
	if _, err := fmt.Sscanf(said, "git version %d.%d", &v[0], &v[1]); err != nil {
		return fmt.Errorf("the program git on this machine says %q where its version is expected", said)
	}
	if v[0] < oldest[0] || v[0] == oldest[0] && v[1] < oldest[1] {
		return fmt.Errorf("the program git on this machine is too old: it is %s, and %d.%d is needed", said, oldest[0], oldest[1])
	}
	return nil
}
