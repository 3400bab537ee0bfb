package rootless

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
)

// wantedIDs is how many ids images use: nobody is 65534.
const wantedIDs = 65536

// span is a line of /etc/subuid or /etc/subgid.
type span struct{ start, count uint32 }

// subIDs returns the ids that file gives to the user, by name or number.
func subIDs(file, name string, uid int) ([]span, error) {
	data, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("look for ids of user %s: %w", name, err)
	}
	spans := parseSubIDs(string(data), name, uid)
	if len(spans) == 0 {
		option := "--add-subuids"
		if strings.HasSuffix(file, "gid") {
			option = "--add-subgids"
		}
		return nil, fmt.Errorf("%s has no range of ids for user %s (%d): as root, run usermod %s 100000-%d %s, with a range that no other user has",
			file, name, uid, option, 100000+wantedIDs-1, name)
	}
	return spans, nil
}

func parseSubIDs(text, name string, uid int) (spans []span) {
	for line := range strings.Lines(text) {
		f := strings.Split(strings.TrimSpace(line), ":")
		if len(f) != 3 || f[0] != name && f[0] != strconv.Itoa(uid) {
			continue
		}
		start, serr := strconv.ParseUint(f[1], 10, 32)
		count, cerr := strconv.ParseUint(f[2], 10, 32)
		if serr == nil && cerr == nil && count > 0 && start+count <= all {
			spans = append(spans, span{uint32(start), uint32(count)})
		}
	}
	return spans
}

// mapArgs are the arguments of newuidmap and newgidmap: the user is root, and the
// ranges follow.
func mapArgs(pid, own int, spans []span) []string {
	args := []string{strconv.Itoa(pid), "0", strconv.Itoa(own), "1"}
	next := uint32(1)
	for _, s := range spans {
		count := min(s.count, all-next)
		args = append(args, strconv.FormatUint(uint64(next), 10), strconv.FormatUint(uint64(s.start), 10), strconv.FormatUint(uint64(count), 10))
		next += count
	}
	return args
}
