package dockerfile

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/kilnbuild/kiln/client/llb"
)

// limit reads a positive number into a field of the resource limits, or -1 if
// it may be unlimited.
func limit[N int64 | uint64](field func(*llb.LinuxResources) *N, unlimited bool) func(*config, string) error {
	return func(c *config, v string) error {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil {
			return err
		}
		if n == -1 && unlimited {
			*field(c.limits()) = N(n)
			return nil
		}
		if n <= 0 {
			return fmt.Errorf("invalid value %s: it must be greater than 0", v)
		}
		*field(c.limits()) = N(n)
		return nil
	}
}

func (c *config) limits() *llb.LinuxResources {
	if c.resources == nil {
		c.resources = &llb.LinuxResources{}
	}
	return c.resources
}

// cpuset reads a list of numbers and ranges such as "0-3,5".
func cpuset(field func(*llb.LinuxResources) *string) func(*config, string) error {
	return func(c *config, v string) error {
		for part := range strings.SplitSeq(v, ",") {
			if err := checkCPURange(strings.TrimSpace(part)); err != nil {
				return fmt.Errorf("invalid element %q of %q: %w", part, v, err)
			}
		}
		*field(c.limits()) = v
		return nil
	}
}

func checkCPURange(part string) error {
	const most = 8192
	if part == "" {
		return nil
	}
	lo, hi, isRange := strings.Cut(part, "-")
	if !isRange {
		hi = lo
	}
	first, err := strconv.Atoi(strings.TrimSpace(lo))
	if err != nil {
		return err
	}
	last, err := strconv.Atoi(strings.TrimSpace(hi))
	if err != nil {
		return err
	}
	if first < 0 || last < first {
		return errors.New("not a range")
	}
	if last > most {
		return fmt.Errorf("more than %d", most)
	}
	return nil
}
