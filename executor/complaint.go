package executor

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/kilnbuild/kiln/executor/native"
	"golang.org/x/sys/unix"
)

// startError finds out whether the runtime failed rather than the process. What
// it finds out before it executes the program is in its log, and what it finds
// out by executing it is all that is printed then, with exit code 1.
func startError(logfile, program string, printed []string, code int) error {
	message := lastError(logfile)
	if message == "" {
		if len(printed) != 1 || code != 1 {
			return nil
		}
		return lastWords(printed[0], program)
	}
	for _, re := range refusals() {
		if m := re.FindStringSubmatch(message); m != nil {
			err := execErrno(m[1])
			if (err == unix.ENOENT || err == unix.ENOTDIR) && !strings.Contains(program, "/") { // of a directory in PATH
				err = native.ErrNotInPath
			}
			return &native.ExecError{Path: program, Err: err}
		}
	}
	return fmt.Errorf("OCI runtime: %s", message)
}

// refusals are how runtimes say that they won't even try to execute a program:
// runc and kilnrun, then crun.
var refusals = patterns(
	`exec: ".*?": (.+)`,
	"(?:executable file `.*` not found|open executable)(.*)",
)

// attempts are how they say that the kernel would not, in the same order.
var attempts = patterns(
	`^exec (\S+): (no such file or directory|exec format error|permission denied)$`,
	"exec container process (?:\\(missing dynamic library\\?\\) )?`(.*)`: (.+)$",
)

// lastWords is the error that line tells of, if it is a runtime's last: it names
// the program that was to be executed, and nothing else was printed before it.
func lastWords(line, program string) error {
	if entry, ok := logEntry([]byte(line)); ok { // crun writes to its standard error as to its log
		line = entry
	}
	for _, re := range attempts() {
		m := re.FindStringSubmatch(line)
		if m != nil && (m[1] == program || strings.HasSuffix(m[1], "/"+program)) {
			return &native.ExecError{Path: program, Err: execErrno(m[2])}
		}
	}
	return nil
}

// execErrno is the error with the text that a runtime gave, be it with Go's words
// or the C library's.
func execErrno(text string) error {
	lower := strings.ToLower(text)
	for _, known := range []error{native.ErrNotInPath, unix.EACCES, unix.EPERM, unix.ENOEXEC, unix.ENOENT, unix.ENOTDIR} {
		if strings.Contains(lower, strings.ToLower(known.Error())) {
			return known
		}
	}
	return errors.New(text)
}

// lastError is the last error in a runtime's log, which it writes only when
// something is wrong.
func lastError(logfile string) (message string) {
	f, err := os.Open(logfile)
	if err != nil {
		return ""
	}
	defer f.Close()
	for scan := bufio.NewScanner(f); scan.Scan(); {
		if entry, ok := logEntry(scan.Bytes()); ok {
			message = entry
		}
	}
	return message
}

// logEntry is what a line of a log in JSON says, if that is an error.
func logEntry(line []byte) (string, bool) {
	var entry struct{ Level, Msg string }
	if json.Unmarshal(line, &entry) != nil || entry.Level != "error" {
		return "", false
	}
	return entry.Msg, true
}
